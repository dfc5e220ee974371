"""One table of Megatron releases: everything that names a release says the same."""

from __future__ import annotations

import ast
import re
from importlib.metadata import requires
from pathlib import Path

from megatron_wallfacer.megatron.releases import (
    FIRST_LAUNCHED,
    MODEL_BUILDER,
    RELEASES,
    REQUIREMENT,
    SUPPORTED,
    version_text,
)

BOUND = re.compile(r"[<>]=?[\d.]+")
ROOT = Path(__file__).resolve().parents[2]
MODULE = ROOT / "megatron_wallfacer" / "megatron" / "releases.py"
PAGE = next(path for path in (ROOT / "docs").glob("*.md") if "<!-- versions: written by" in path.read_text())


def test_releases_are_in_order_and_without_a_gap() -> None:
    numbers = [one.number for one in RELEASES]
    assert numbers == [(0, minor) for minor in range(numbers[0][1], numbers[0][1] + len(numbers))]
    assert all(one.tested.startswith(version_text(one.number) + ".") for one in RELEASES)
    # The launcher runs every release from one on.
    assert [one.launcher for one in RELEASES] == sorted(one.launcher for one in RELEASES)


def test_texts() -> None:
    launched, wheels = ([one.number for one in RELEASES if getattr(one, name)] for name in ("launcher", "wheel"))
    assert f"megatron-core 0.17 to {version_text(launched[-1])}" == SUPPORTED
    above = version_text((0, wheels[-1][1] + 1))
    assert f"megatron-core[training]>=0.17,<{above}" == REQUIREMENT


def test_the_module_imports_nothing_of_the_package() -> None:
    imported = [
        node for node in ast.walk(ast.parse(MODULE.read_text())) if isinstance(node, ast.Import | ast.ImportFrom)
    ]
    assert {getattr(node, "module", None) for node in imported} == {"__future__", "typing"}


def test_the_extra_of_the_package_is_what_the_table_says() -> None:
    name = REQUIREMENT.partition(">")[0]
    extras = [text for text in requires("megatron-wallfacer") or () if text.startswith(name)]
    assert extras
    for extra in extras:
        assert set(BOUND.findall(extra.partition(";")[0])) == set(BOUND.findall(REQUIREMENT))


def test_the_documents_have_the_releases_that_were_tested() -> None:
    rows = re.findall(r"^\| (\d+\.\d+\.\d+) \| (wheel|checkout) \|", PAGE.read_text(), flags=re.MULTILINE)
    assert [version for version, source in rows if source == "wheel"] == [one.tested for one in RELEASES if one.wheel]
    launched = {version_text(one.number) for one in RELEASES if one.launcher}
    assert {version.rpartition(".")[0] for version, source in rows if source == "checkout"} == launched


def test_the_own_script_needs_the_release_of_the_table() -> None:
    """It runs without the plugin too, so it has the number itself."""
    text = (ROOT / "scripts" / "pretrain_gpt.py").read_text()
    assert f"(package_info.MAJOR, package_info.MINOR) < {MODEL_BUILDER}:" in text
    assert f"needs megatron-core {version_text(MODEL_BUILDER)} or newer" in text


def test_no_other_module_has_a_number_of_a_release() -> None:
    """As a literal tuple: (0, 19)."""
    for path in sorted((ROOT / "megatron_wallfacer").rglob("*.py")):
        if path == MODULE:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Tuple) and len(node.elts) == 2:
                values = [one.value if isinstance(one, ast.Constant) else None for one in node.elts]
                assert tuple(values) not in {one.number for one in RELEASES}, f"{path}:{node.lineno}"


def test_the_first_release_of_the_launcher() -> None:
    assert FIRST_LAUNCHED == (0, 17)
