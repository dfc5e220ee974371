"""What is installed without a checkout has its presets, its clusters and its training script."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from megatron_wallfacer.shipped import CONFIGS, SCRIPT

REPOSITORY = Path(__file__).resolve().parents[1]
PARTS = (
    "setup.py",
    "pyproject.toml",
    "MANIFEST.in",
    "README.md",
    "LICENSE",
    "configs",
    "scripts",
    "megatron_wallfacer",
)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that a wheel was unpacked into; the wheel is of a source distribution, which must be whole too."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in PARTS:
        copy = shutil.copytree if (REPOSITORY / name).is_dir() else shutil.copy
        copy(REPOSITORY / name, source / name)
    build = "from setuptools.build_meta import build_sdist, build_wheel; import sys; "
    python(source, build + "build_sdist(sys.argv[1])", str(folder))
    (packed,) = folder.glob("*.tar.gz")
    shutil.unpack_archive(packed, folder / "unpacked")
    (source,) = (folder / "unpacked").iterdir()
    python(source, build + "build_wheel(sys.argv[1])", str(folder))
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def python(folder: Path, *words: str) -> str:
    done = subprocess.run([sys.executable, "-c", *words], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def wallfacer(site: Path, *words: str) -> str:
    """A command of the installed package: the current folder comes before what this environment has."""
    said = python(site, "import sys; from megatron_wallfacer.cli.main import main; sys.exit(main())", *words)
    assert python(site, "import megatron_wallfacer as m; print(m.__file__)").startswith(str(site))
    return said


def test_a_checkout_has_them_beside_the_package() -> None:
    assert (CONFIGS, SCRIPT) == (REPOSITORY / "configs", REPOSITORY / "scripts" / "pretrain_gpt.py")


def test_clusters_and_presets_have_names(installed: Path) -> None:
    assert "--wallfacer-cp-size" in wallfacer(installed, "config", "show", "llama3-8b-1m")
    plan = ("plan", "--cluster", "h100-8x8", "--nodes", "1", "--seq", "64K")
    assert "h100-8x8: 1 nodes x 8 devices" in wallfacer(installed, *plan)


def test_a_run_finds_its_script(installed: Path) -> None:
    command = wallfacer(installed, "run", "tiny-cpu", "--dry-run").split()
    (script,) = [word for word in command if word.endswith("pretrain_gpt.py")]
    assert Path(script) == installed / "megatron_wallfacer" / "scripts" / "pretrain_gpt.py"
    assert Path(script).read_text() == SCRIPT.read_text()


def test_every_file_is_there(installed: Path) -> None:
    def files(folder: Path, root: Path) -> set[Path]:
        return {path.relative_to(root) for path in folder.rglob("*.*") if path.is_file() and path.suffix != ".pyc"}

    inside = installed / "megatron_wallfacer"
    for folder in ("configs", "cli", "planning"):
        root = REPOSITORY if folder == "configs" else REPOSITORY / "megatron_wallfacer"
        assert files(root / folder, root) == files(inside / folder, inside)
