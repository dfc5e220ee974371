"""Shipped command lines start on a GPU: with megatron-core's wheel alone, and with TransformerEngine."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_wallfacer.megatron.needed_arguments import Libraries, complete_for_gpu
from tests.megatron.shipped_lists import MODELS, PRESETS
from tests.megatron.training import corpus

REPOSITORY = Path(__file__).parents[2]
STAND_INS = REPOSITORY / "tests" / "support" / "stand_ins"
BARE, TE = Libraries(False, False), Libraries(True, False)
#: Runs of the demonstration; those of parity by the kinds of layers: Megatron's own, and with the library all three.
DEMO, PARITY, JOB = 3, {BARE: 7, TE: 13}, {BARE: 5, TE: 7}


@functools.cache
def found(libraries: Libraries) -> dict[str, dict[str, Any]]:
    """What became of each list, by its name, in an environment that has these libraries; one process for all lists."""
    corpus()  # to write it imports Megatron, which the process below may do only when torch claims to have CUDA
    paths = [str(STAND_INS)] if libraries.transformer_engine else []
    paths += filter(None, [os.environ.get("PYTHONPATH")])
    hidden = ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_MAX_CONNECTIONS")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.megatron.gpu_lists"],
        cwd=REPOSITORY,
        env=environment | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return {one["name"]: one for one in map(json.loads, done.stdout.splitlines())}


def names(libraries: Libraries) -> list[str]:
    demo = [f"demo {number}" for number in range(1, DEMO + 1)]
    parity = [f"parity {number}" for number in range(1, PARITY[libraries] + 1)]
    job = [f"job {number}" for number in range(1, JOB[libraries] + 1)]
    return [*demo, *parity, *job, *PRESETS, *(f"model {name}" for name in MODELS if libraries is BARE)]


@pytest.mark.parametrize("libraries", [BARE, TE], ids=["wheel only", "TransformerEngine"])
def test_every_list_builds_its_model(libraries: Libraries) -> None:
    answers = found(libraries)
    assert {name: one["error"] for name, one in answers.items() if "error" in one and name != "as typed"} == {}
    assert set(answers) == {*names(libraries), "as typed"}
    for name in names(libraries):
        one, flags = answers[name], answers[name]["argv"]
        split = "--wallfacer-cp-size" in flags
        assert one["layers"] > 0
        assert one["plugin"] == (one["layers"] if split else 0)
        assert one["kernel"] == (("te" if libraries.transformer_engine else "torch") if split else None)
        assert one["samples"][0] > 0
        local = "local" in flags
        assert ("transformer_engine" in one["modules"]) == libraries.transformer_engine
        assert one["fused softmax"] is not local  # its kernel is imported by the first forward pass
    eight_billion = answers["llama3-8b-128k"]
    assert 2 * eight_billion["parameters"] == pytest.approx(8.03e9, rel=0.002)  # whole, on two tensor-parallel ranks


def test_torchs_norms_are_marked_for_sequence_parallelism() -> None:
    """Two a layer and the last one: their gradients are of other tokens on each rank."""
    assert found(BARE)["llama3-8b-128k"]["marked"] == 65


@pytest.mark.parametrize(
    ("libraries", "reason"),
    [(BARE, "apply_rope_fusion is not available"), (TE, "fused_weight_gradient_mlp_cuda module is not found")],
    ids=["wheel only", "TransformerEngine"],
)
def test_what_a_user_types_is_not_completed(libraries: Libraries, reason: str) -> None:
    """The same preset as its file says it: Megatron's own error."""
    assert reason in found(libraries)["as typed"]["error"]


def test_only_what_is_missing_is_added() -> None:
    typed = ["--seq-length", "64", "--eval-interval=7"]
    assert complete_for_gpu(typed, Libraries(True, True)) == typed
    assert complete_for_gpu(typed, TE) == [*typed, "--no-gradient-accumulation-fusion"]
    unfused = ["--no-persist-layer-norm", "--no-masked-softmax-fusion", "--no-rope-fusion"]
    local = ["--transformer-impl", "local"]
    assert complete_for_gpu(typed, BARE) == [*typed, *local, *unfused, "--no-gradient-accumulation-fusion"]
    assert complete_for_gpu([*local, "--no-rope-fusion"], Libraries(True, True)) == [
        *local,
        "--no-rope-fusion",
        "--eval-interval",
        "1000",
        *unfused[:2],
    ]
    given = ["--transformer-impl", "transformer_engine", *typed]
    assert complete_for_gpu(given, BARE) == [*given, "--no-gradient-accumulation-fusion"]
