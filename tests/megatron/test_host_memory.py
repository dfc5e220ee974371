"""Activations in host memory: the same training to the bit, with copies in time, in exact slots."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import pytest

from megatron_wallfacer.offload.copies import Record
from tests.megatron.training import arguments
from tests.offload.test_queue import check_records
from tests.support.megatron_runs import RunResult, train

SCRIPT = Path(__file__).resolve().parents[1] / "support" / "offloaded.py"
ITERATIONS = 3
KEEP = "--wallfacer-keep-attention-output"
UNIFORM = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
SPLIT = "--wallfacer-cp-size 2"
PIPELINE = "--num-layers 4 --pipeline-model-parallel-size 2 --global-batch-size 4"
VIRTUAL = "--num-layers 8 --pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 2 "
BOTH = "--wallfacer-keep-on-host 1 --wallfacer-layer-inputs-on-host 1"
#: (ranks, flags of both runs, flags of the run with host memory).
TRAINED = {
    "full, head axis": (2, f"{SPLIT} --wallfacer-scheme ulysses {UNIFORM} {KEEP}", BOTH),
    "inputs alone": (2, f"{SPLIT} {UNIFORM}", "--wallfacer-layer-inputs-on-host 1"),
    "selective": (2, f"{SPLIT} --recompute-activations {KEEP}", "--wallfacer-keep-on-host 1"),
    "three layers of four, two at a time, evaluation": (
        2,
        f"{SPLIT} --num-layers 4 {UNIFORM.replace('layers 1', 'layers 2')} {KEEP} --hidden-dropout 0.1 "
        "--eval-interval 2 --eval-iters 1",
        "--wallfacer-keep-on-host 0.75 --wallfacer-layer-inputs-on-host 0.5",
    ),
    "block, pipeline, sequence parallelism": (
        4,
        f"--wallfacer-cp-size 1 --tensor-model-parallel-size 2 --sequence-parallel {PIPELINE} "
        f"{UNIFORM.replace('uniform', 'block')} {KEEP}",
        "--wallfacer-keep-on-host auto --wallfacer-layer-inputs-on-host auto",
    ),
    "virtual pipeline": (4, f"{SPLIT} {VIRTUAL} --global-batch-size 4 {UNIFORM} {KEEP}", BOTH),
}


@cache
def run_of(ranks: int, flags: str, **env: str) -> RunResult:
    return train(ranks, arguments(*flags.split(), iterations=ITERATIONS), script=SCRIPT, env=env)


def said(run: RunResult) -> list[dict]:
    """What each rank printed."""
    lines = [line for rank in run.ranks for line in rank.output.splitlines()]
    return [json.loads(line.removeprefix("offloaded ")) for line in lines if line.startswith("offloaded ")]


@pytest.mark.parametrize("name", TRAINED)
def test_training_is_the_same_to_the_bit(name: str) -> None:
    ranks, flags, on_host = TRAINED[name]
    run, plain = (run_of(ranks, text).check() for text in (f"{flags} {on_host}", flags))
    assert run.losses == plain.losses
    assert run.grad_norms == plain.grad_norms
    assert "wallfacer: in host memory: " in run.output
    for rank in said(run):
        check_rank([Record(what, number, tuple(hosts), after) for what, number, hosts, after in rank["records"]])


def check_rank(records: list[Record]) -> None:
    """Check what a rank did: every copy waited on, slots in turns, copies issued before the layer that follows."""
    check_records([record for record in records if record.what not in ("step", "layer", "store", "load")])
    of_layers = [at for at, record in enumerate(records) if record.what == "layer"]
    stored: dict[tuple, int] = {}
    issued: dict[tuple, int] = {}
    keys = {}
    for at, record in enumerate(records):
        key = record.number, *record.addresses
        if record.what == "store":
            following = next(other for other in records[at:] if other.what in ("to host", "layer"))
            assert following.what == "to host"
            keys[following.number], stored[key] = key, at
        elif record.what == "to device":
            issued[keys[record.after]] = at
        elif record.what == "load":
            # Its copy was issued in the backward pass of the layer before, or right behind the copy to the host.
            begun = issued.pop(key)
            own = max(start for start in stored.values() if start < begun) == stored.pop(key)
            assert own or any(begun < layer < at for layer in of_layers)
    assert not stored


def test_the_device_holds_as_much_with_more_layers() -> None:
    """With both flags the peak of a step does not depend on the number of layers; without them it does."""
    peaks = {
        (layers, on_host): said(run_of(2, f"{SPLIT} --num-layers {layers} {UNIFORM} {KEEP} {on_host}").check())
        for layers in (4, 8)
        for on_host in ("", BOTH)
    }
    of = {key: [rank["peaks"][1:] for rank in ranks] for key, ranks in peaks.items()}
    assert of[4, BOTH] == of[8, BOTH]
    # Four more layers of an input and an output of 128 tokens, 64 channels in fp32.
    for fewer, more in zip(of[4, ""], of[8, ""], strict=True):
        assert [b - a for a, b in zip(fewer, more, strict=True)] == [4 * 2 * 128 * 64 * 4] * 2


@pytest.mark.parametrize("direction", ["to host", "to device"])
def test_a_removed_wait_fails(direction: str) -> None:
    ranks, flags, on_host = TRAINED["full, head axis"]
    run = run_of(ranks, f"{flags} {on_host}", OFFLOADED_WITHOUT_WAIT=direction)
    same = run.exit_codes == [0, 0] and run.losses == run_of(ranks, f"{flags} {on_host}").losses
    assert not same


def test_too_little_memory_is_one_error_before_the_first_step() -> None:
    ranks, flags, on_host = TRAINED["inputs alone"]
    script = SCRIPT.with_name("little_memory.py")
    run = train(ranks, arguments(*flags.split(), *on_host.split(), iterations=1), script=script)
    assert run.exit_codes == [2] * ranks
    for rank in run.ranks:
        assert (
            "--wallfacer-layer-inputs-on-host 1.0: needs 0.000131 GB of host memory for the 2 ranks on " in rank.output
        )
        assert "which has 1e-06 GB left (MemAvailable of /proc/meminfo): use a smaller fraction, or auto" in rank.output
        assert not rank.iterations
