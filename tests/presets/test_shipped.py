"""Every preset of this repository under Megatron's own parser: the installed one, and those of MEGATRON_PATHS."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_wallfacer.presets.check import CheckResult, check_presets
from megatron_wallfacer.presets.entry import COMMAND_LINE, PresetEntry
from megatron_wallfacer.presets.preset import Preset, load_preset
from megatron_wallfacer.presets.preset_file import STATEMENTS
from megatron_wallfacer.presets.torchrun import FLAGS

REPOSITORY = Path(__file__).parents[2]
CONFIGS = REPOSITORY / "configs"
# Descriptions of clusters are no presets.
FILES = sorted(file for file in CONFIGS.rglob("*.yaml") if file.parent.name != "cluster")
MEGATRONS = [None, *(Path(path) for path in os.environ.get("MEGATRON_PATHS", "").split(":") if path)]
OPTIONS = ("--env", "--json", "--script", "--megatron-path", "--dry-run")
RECIPES = {
    "tiny-cpu": (2, "team-ring: ring_outer 2"),
    "paper-7b-64k": (32, "wallfacer: team 4 x kv_team 4 x ring_outer 2"),
    "llama3-8b-128k": (16, "team-ring: kv_team 2 x ring_outer 4"),
    "llama3-8b-1m": (64, "team-ring: ring_outer 8"),
}


def combined(folder: Path, *parts: str) -> Path:
    """A recipe of these parts."""
    names = ", ".join(str(CONFIGS / f"{part}.yaml") for part in parts)
    file = folder / f"{'+'.join(parts).replace('/', '-')}.yaml"
    file.write_text(f"extends: [{names}]\nTORCHRUN_ARGS: {{--nnodes: 8, --nproc-per-node: 8}}\n")
    return file


def with_flags(preset: Preset, *names: str) -> Preset:
    return replace(preset, model={name: PresetEntry(name, ("1",), COMMAND_LINE) for name in names})


def said(files: Sequence[Path], verdicts: Sequence[CheckResult]) -> dict[str, list[str]]:
    return {
        file.name: [str(problem) for problem in verdict.problems] for file, verdict in zip(files, verdicts, strict=True)
    }


@pytest.mark.parametrize("megatron", MEGATRONS, ids=lambda path: str(path or "installed"))
def test_all_are_good_alone_and_combined(tmp_path: Path, megatron: Path | None) -> None:
    models, grids = (
        [f"{kind}/{file.stem}" for file in FILES if file.parent.name == kind] for kind in ("model", "parallel")
    )
    pairs = [
        combined(tmp_path, model, grid)
        for model in models
        for grid in grids
        if "tp8" not in grid or "tiny" not in model
    ]
    presets = [load_preset(file) for file in FILES]
    presets += [load_preset(file, "--seq-length 8192 --micro-batch-size 1 --train-iters 1".split()) for file in pairs]
    *verdicts, taken = check_presets([*presets, with_flags(presets[0], *FLAGS, *OPTIONS)], megatron)
    # What `wallfacer run` keeps for itself and torchrun must not be Megatron's.
    assert len(taken.problems) == len(FLAGS) + len(OPTIONS)
    assert said([*FILES, *pairs], verdicts) == {file.name: [] for file in (*FILES, *pairs)}
    found = {
        file.stem: (preset.ranks, verdict.grid)
        for file, preset, verdict in zip(FILES, presets, verdicts, strict=False)
        if file.parent == CONFIGS
    }
    assert found == RECIPES
    assert all(verdict.grid for verdict in verdicts[len(FILES) :])
    parts_of_presets = {file.parent.name for file, verdict in zip(FILES, verdicts, strict=False) if not verdict.rules}
    assert parts_of_presets == {"parallel", "env", "data", "train"}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_states_where_it_was_run_and_what_it_does_not_cover(name: str) -> None:
    statements = load_preset(Path(name)).statements
    assert tuple(statements) == STATEMENTS
    assert all(all(texts) for texts in statements.values())
    if name != "tiny-cpu":
        assert statements["validated_on"][0].startswith("no GPU")


def test_megatron_validates_the_recipes_for_gpus() -> None:
    """What it checks only at start: sizes that divide, flags that go together, an interval that it needs."""
    files = [str(CONFIGS / f"{name}.yaml") for name in RECIPES if name != "tiny-cpu"]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.presets.validate", *files],
        cwd=REPOSITORY,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith(tuple(RECIPES))]
    assert lines == ["paper-7b-64k 1 32 1000", "llama3-8b-128k 1 8 1000", "llama3-8b-1m 1 8 1000"]


def test_wrong_entries_are_named_with_their_location(tmp_path: Path) -> None:
    """In one process, since it takes seconds to start: each command line with the one line that answers it."""
    base = CONFIGS / "tiny-cpu.yaml"
    gpu = "CUDA_VISIBLE_DEVICES=0"
    cp = f"{CONFIGS}/parallel/cp2.yaml:2"
    expected = {
        "MODEL_ARGS: {--num-layerz: 3, --foo: 1}": [
            "HERE:2: --num-layerz: this Megatron has no such flag; did you mean --num-layers?",
            "HERE:2: --foo: this Megatron has no such flag",
        ],
        "MODEL_ARGS: {--num-layers: two}": ["HERE:2: --num-layers: invalid int value: 'two'"],
        "MODEL_ARGS: {--bf16: 1}": ["HERE:2: --bf16: takes no value 1"],
        "MODEL_ARGS: {--num-layers: true}": ["HERE:2: --num-layers: expected one argument"],
        "MODEL_ARGS: {--seq-length: 255}": [
            "HERE:2: --seq-length 255: must be a multiple of 2 x --wallfacer-cp-size 2, because"
        ],
        "TORCHRUN_ARGS: {--nproc-per-node: 3}": [f"{cp}: --wallfacer-cp-size 2 on 3 ranks"],
        "MODEL_ARGS: {--attention-dropout: false}": [f"{cp}: --attention-dropout 0.1 (Megatron's default): must be 0"],
        "MODEL_ARGS: {--fp8-format: e4m3}": ["HERE:2: --fp8-format e4m3 needs CUDA"],
        "MODEL_ARGS: {--num-attention-heads: false}": [f"{cp}: --num-attention-heads: must be on the command line"],
        "MODEL_ARGS: {--wallfacer-kernel: quick}": ["HERE:2: --wallfacer-kernel quick: must be one of auto"],
        "MODEL_ARGS: {--num-layers: 3}": [],
    }
    presets, files = [], []
    for number, text in enumerate(expected):
        files.append(tmp_path / f"{number}.yaml")
        files[-1].write_text(f"extends: [{base}]\n{text}\n")
        presets.append(load_preset(files[-1]))
    # For a GPU: FP8 is not rejected, which kernel serves is not asked where there is none, but its name is.
    presets += [load_preset(files[index], [], [gpu]) for index in (7, 9)]
    *verdicts, fp8, kernel = check_presets(presets)
    for file, verdict, lines in zip(files, verdicts, expected.values(), strict=True):
        problems = [str(problem) for problem in verdict.problems]
        assert len(problems) == len(lines)
        for problem, line in zip(problems, lines, strict=True):
            assert problem.startswith(line.replace("HERE", str(file)))
            assert len(problem.splitlines()) == 1
    assert not fp8.problems
    assert "--wallfacer-kernel quick: must be one of auto" in str(kernel.problems[0])
    assert [verdict.kernel for verdict in verdicts] == [True] * len(verdicts)
