from __future__ import annotations

from pathlib import Path

import pytest

from megatron_wallfacer.kernels.optional import FLASH_ATTN_2, Library, UnavailableError


def library(*modules: str) -> Library:
    return Library("some-package", modules, "pip install some-package")


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def test_what_is_not_there_is_said_with_how_to_get_it(modules: Path) -> None:
    with pytest.raises(UnavailableError) as error:
        library("absent_one.inner", "absent_two").load()
    assert str(error.value) == "some-package is not installed: pip install some-package"


def test_a_package_without_the_module_counts_as_not_installed(modules: Path) -> None:
    (modules / "here_a").mkdir()
    (modules / "here_a" / "__init__.py").touch()
    with pytest.raises(UnavailableError, match="some-package is not installed"):
        library("here_a.interface").load()


def test_the_first_module_that_is_there_is_taken(modules: Path) -> None:
    (modules / "here_b.py").write_text("value = 3")
    assert library("absent_one", "here_b").load().value == 3


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("import not_there_either", "No module named 'not_there_either'"),
        ("raise OSError('undefined symbol: _ZN3c10\\nmore')", "undefined symbol: _ZN3c10"),
        ("raise RuntimeError", "RuntimeError"),
    ],
)
def test_a_library_that_does_not_import_is_rejected_with_its_reason(modules: Path, content: str, reason: str) -> None:
    name = f"broken_{abs(hash(content))}"
    (modules / f"{name}.py").write_text(content)
    with pytest.raises(UnavailableError) as error:
        library(name).load()
    assert str(error.value) == f"some-package does not import: {reason}"


def test_the_title_names_the_version_that_is_installed() -> None:
    assert Library("pytest", (), "").title == f"pytest {pytest.__version__}"
    assert library().title == "some-package"


def test_libraries_are_named_as_on_the_index() -> None:
    assert FLASH_ATTN_2.package == "flash-attn"
