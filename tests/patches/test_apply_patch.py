"""scripts/apply_patch.sh: on made-up checkouts, and on copies of those that MEGATRON_PATHS names."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_wallfacer.megatron.releases import RELEASES, UNTIL, version_text
from megatron_wallfacer.presets.preset import load_preset
from megatron_wallfacer.training_runs.training_log import parse_iteration

REPOSITORY = Path(__file__).parents[2]
SCRIPT = REPOSITORY / "scripts" / "apply_patch.sh"
LINE = "import megatron_wallfacer.auto  # noqa: F401\n"
#: Line of the import in Megatron's script by release: the same from 0.18 on, until a release moves it.
PLACES = {version_text(one.number): 9 for one in RELEASES if one.launcher} | {"0.17": 8}
CHECKOUTS = [Path(path) for path in os.environ.get("MEGATRON_PATHS", "").split(":") if path]
checkouts = pytest.mark.parametrize("checkout", CHECKOUTS, ids=str)
needs_checkouts = pytest.mark.skipif(not CHECKOUTS, reason="MEGATRON_PATHS names no Megatron-LM checkout")


def made_up(folder: Path, version: str, before: int | None = None) -> Path:
    """A checkout with as many lines before its first import as that release has before the place of ours."""
    major, minor = version.split(".")
    core = folder / "megatron" / "core"
    core.mkdir(parents=True)
    (core / "package_info.py").write_text(f"MAJOR = {major}\nMINOR = {minor}\nPATCH = 0\n")
    lines = (before if before is not None else PLACES.get(version, 9) - 1) * ["# a line\n"]
    (folder / "pretrain_gpt.py").write_text(
        "".join([*lines, "import json\n", "import torch\n", "import megatron.core\n"])
    )
    return folder


def apply(checkout: Path, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [SCRIPT, checkout, *words],
        env=os.environ | {"PYTHON": sys.executable} | variables,
        capture_output=True,
        text=True,
    )


def goes_in_and_out(checkout: Path) -> None:
    """Applied twice and taken out twice; nothing else changes."""
    script = checkout / "pretrain_gpt.py"
    before = script.read_text()
    for said in ("applied to", "is patched already"):
        done = apply(checkout)
        assert (done.returncode, done.stderr) == (0, "")
        assert said in done.stdout
        assert script.read_text().count(LINE) == 1
        assert script.read_text().replace(LINE, "") == before
    for said in ("took the import out of", "is not patched"):
        done = apply(checkout, "--revert")
        assert (done.returncode, done.stderr) == (0, "")
        assert said in done.stdout
        assert script.read_text() == before


def rejects(checkout: Path, message: str, *words: str, **variables: str) -> None:
    """One line, and the script stays as it was."""
    script = checkout / "pretrain_gpt.py"
    before = script.read_text() if script.exists() else None
    done = apply(checkout, *words, **variables)
    assert done.returncode == 1
    assert message in done.stderr.splitlines()[-1]
    assert done.stderr.startswith("apply_patch: error: ")
    assert before is None or script.read_text() == before


def test_there_is_a_patch_for_each_supported_release_and_it_is_one_line() -> None:
    patches = {path.name: path.read_text().splitlines() for path in (REPOSITORY / "patches").iterdir()}
    assert set(patches) == {f"core_{version_text(one.number)}.patch" for one in RELEASES if one.launcher}
    for header, other, hunk, *lines in patches.values():
        assert header.startswith("--- ")
        assert other.startswith("+++ ")
        assert hunk.startswith("@@ ")
        assert lines == ["+" + LINE.rstrip()]


@pytest.mark.parametrize("version", PLACES)
def test_it_goes_in_once_and_out_again(tmp_path: Path, version: str) -> None:
    checkout = made_up(tmp_path, version)
    goes_in_and_out(checkout)
    apply(checkout)
    assert (checkout / "pretrain_gpt.py").read_text().splitlines(keepends=True)[PLACES[version] - 1] == LINE


def test_inside_another_repository(tmp_path: Path) -> None:
    """Where git would pass over a patch with headers of its own kind, `diff --git`, and call it success."""
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    goes_in_and_out(made_up(tmp_path / "third party" / "megatron", "0.19"))


def test_in_a_repository_of_its_own(tmp_path: Path) -> None:
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    goes_in_and_out(made_up(tmp_path, "0.19"))


def test_it_comes_out_when_lines_above_were_added(tmp_path: Path) -> None:
    script = made_up(tmp_path, "0.18") / "pretrain_gpt.py"
    apply(tmp_path)
    script.write_text("# mine\n" + script.read_text())
    assert apply(tmp_path, "--revert").returncode == 0
    assert LINE not in script.read_text()


@pytest.mark.parametrize("version", ["0.16", version_text(UNTIL), "1.19"])
def test_an_unknown_release_is_rejected(tmp_path: Path, version: str) -> None:
    made_up(tmp_path, version)
    rejects(tmp_path, f"megatron-core {version} of {tmp_path} has no patch; there are: core_0.17.patch")
    rejects(tmp_path, f"megatron-core {version} of", "--revert")


def test_what_is_no_checkout_is_rejected(tmp_path: Path) -> None:
    rejects(tmp_path, "is no Megatron-LM checkout")
    rejects(tmp_path, "usage: scripts/apply_patch.sh MEGATRON_PATH [--revert]", "--undo")
    rejects(tmp_path, "usage: ", "--revert", "--revert")
    rejects(made_up(tmp_path / "made up", "0.19"), "/no/python: is not here", PYTHON="/no/python")


@pytest.mark.parametrize("text", ["", "if True:\n" + 12 * "    pass\n", "import torch\n" * 12, "import json\n" * 12])
def test_a_script_of_another_shape_is_left_as_it_was(tmp_path: Path, text: str) -> None:
    """Too short, the place in a block, torch before it, nothing of Megatron's behind it."""
    (made_up(tmp_path, "0.19") / "pretrain_gpt.py").write_text(text)
    rejects(tmp_path, "is not as core_0.19.patch expects; it is left as it was")


def test_what_git_rejects_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "git").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "git").chmod(0o755)
    checkout = made_up(tmp_path / "checkout", "0.19")
    rejects(checkout, "git could not apply", PATH=f"{tmp_path}:{os.environ['PATH']}")


def test_a_link_is_rejected(tmp_path: Path) -> None:
    """git would replace the link."""
    script = made_up(tmp_path, "0.19") / "pretrain_gpt.py"
    script.rename(tmp_path / "real.py")
    script.symlink_to("real.py")
    rejects(tmp_path, "pretrain_gpt.py is a link")
    assert script.is_symlink()


def test_an_import_in_the_wrong_place_is_not_called_applied(tmp_path: Path) -> None:
    script = made_up(tmp_path, "0.19") / "pretrain_gpt.py"
    script.write_text(script.read_text() + LINE)
    rejects(tmp_path, "has the import, but not once and before torch and Megatron")


def test_taking_out_one_of_two_is_not_called_done(tmp_path: Path) -> None:
    script = made_up(tmp_path, "0.19") / "pretrain_gpt.py"
    apply(tmp_path)
    script.write_text(script.read_text() + LINE)
    done = apply(tmp_path, "--revert")
    assert done.returncode == 1
    assert "still has the import" in done.stderr


@needs_checkouts
@checkouts
def test_on_a_copy_of_a_checkout(tmp_path: Path, checkout: Path) -> None:
    core = Path("megatron", "core")
    (tmp_path / core).mkdir(parents=True)
    shutil.copy(checkout / "pretrain_gpt.py", tmp_path)
    shutil.copy(checkout / core / "package_info.py", tmp_path / core)
    goes_in_and_out(tmp_path)


@needs_checkouts
@checkouts
def test_the_patched_script_trains_when_it_is_typed_itself(tmp_path: Path, checkout: Path) -> None:
    """The tiny preset on two CPU ranks, without the plugin's launcher."""
    for script in checkout.glob("*.py"):
        shutil.copy(script, tmp_path)
    (tmp_path / "megatron").symlink_to(checkout / "megatron")
    assert apply(tmp_path).returncode == 0
    preset = load_preset(REPOSITORY / "configs" / "tiny-cpu.yaml", ["--train-iters", "2"])
    assert preset.argv[preset.argv.index("--wallfacer-cp-size") + 1] == "2"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*torchrun, "pretrain_gpt.py", *preset.argv],
        cwd=tmp_path,
        env=os.environ | preset.environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "wallfacer: 2 of 2 attention layers" in done.stdout
    iterations = [found for line in done.stdout.splitlines() if (found := parse_iteration(line))]
    assert [iteration.number for iteration in iterations] == [1, 2]
