"""What is measured on a GPU runs on a CPU, small; and its verdicts are verdicts."""

from __future__ import annotations

import argparse
import csv
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import accuracy, efficiency, exact, gaps, memory, on_host, parity, step, traffic
from benchmarks.gpu.no_kernel import NoKernel
from benchmarks.gpu.profiled import COPY, Busy, copies_under_kernels
from benchmarks.gpu.ranks import Ranks
from benchmarks.gpu.rows import Rows
from megatron_wallfacer.attention import forget_groups
from megatron_wallfacer.errors import WallfacerError
from tests.support.pool import Pool

SMOKE = ["--smoke", "--device", "cpu"]


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_rank_does_its_share_of_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pairs of tokens that kernels are given: N^2 / (2 P), whichever scheme."""
    pairs = []

    class Counting(NoKernel):
        def forward(self, q, k, v, tile, spec):
            assert (tile.height, tile.width) == (len(q), len(k))
            pairs.append(q.shape[0] * k.shape[0] / (2 if tile.causal else 1) * q.shape[2])
            return super().forward(q, k, v, tile, spec)

    for scheme in efficiency.SCHEMES:
        pairs.clear()
        plan = efficiency.make_plan(scheme, 8, q_heads=4, kv_heads=2)
        one = efficiency.OneRank(plan, 2048, (4, 2), 32, Counting(), torch.device("cpu"), torch.float32)
        one.forward(*one.inputs()[:3])
        assert sum(pairs) == pytest.approx(4 * 2048**2 / 16, rel=0.01)


def test_verdicts_of_efficiency() -> None:
    row = efficiency.Row("team-ring", "", 16384, rank=(1.0, 1.0), dense=(0.94, 0.96))
    assert row.verdict == "ok"
    assert replace(row, dense=(0.94, 0.94)).verdict == "below"
    assert replace(row, rank_tokens=2048, dense=(0.81, 0.81)).verdict == "ok"
    assert replace(row, rank_tokens=2048, dense=(0.79, 0.96)).verdict == "below"
    assert replace(row, rank_tokens=1024, dense=(0.1, 0.96)).verdict == ""
    assert replace(row, scheme="ring", dense=(0.1, 0.96)).verdict == ""


def test_traffic_of_a_rank_is_counted_by_hand() -> None:
    """One rank alone: one tile, nothing to merge with."""
    tokens, heads, channels = 1024, 4, 128
    wide = tokens * heads * channels
    forward, backward = traffic.count(1, tokens, (heads, heads), "ring").bytes
    lse = tokens * heads * 4
    # From the kernel into the result in one step.
    assert forward == {"merges": (2 + 2) * wide + 2 * lse}
    # Its tiles read the output itself: no row sums, no proxy.
    assert backward == {"copies": 3 * (2 + 2) * wide}


def test_a_rank_moves_less_than_before_lists() -> None:
    """At P 64, 1M tokens, 32 heads: 30 % below 33,105 and 73,490 MiB, which the engine moved at 58ab676."""
    moved = [one.total() / 2**20 for one in traffic.count(64, 1 << 20, (32, 32), "team-ring").bytes]
    assert [size <= most for size, most in zip(moved, (23_173, 51_443), strict=True)] == [True, True], moved


def test_kernels_of_our_own_leave_a_rank_less_to_move() -> None:
    ours, theirs = (traffic.count(8, 1 << 18, (8, 8), "team-ring", operators_only=only) for only in (False, True))
    assert all(mine.total() < operators.total() for mine, operators in zip(ours.bytes, theirs.bytes, strict=True))
    # What is wanted of a rank with 16K tokens or more is within reach, at the rates of an H100.
    (forward, backward), (_, without) = (one.efficiency((600, 480), 3000) for one in (ours, theirs))
    assert forward >= 0.93
    assert backward >= 0.95
    assert backward > without


def test_verdicts_of_memory() -> None:
    row = memory.Row("", (100.0, 100.0), (109, 109), 0)
    assert row.verdict == "ok"
    assert replace(row, measured=(109, 111)).verdict == "over"
    assert replace(row, growth=1).verdict == "over"


def test_kernels_of_a_cpu_are_right(tmp_path: Path) -> None:
    assert accuracy.main([*SMOKE, "--kernels", "torch", "reference", "cudnn", "--out", str(tmp_path)]) == 0
    rows = table(tmp_path / "accuracy-bfloat16.csv")
    assert [row["verdict"][:8] for row in rows if row["kernel"] == "cudnn"] == ["left out"]
    single = [kind.name for kind in accuracy.KINDS if kind.documents is None]
    for kernel, kinds in (("torch", single), ("reference", [kind.name for kind in accuracy.KINDS])):
        served = [row["tile"] for row in rows if row["kernel"] == kernel and row["verdict"] == "ok"]
        assert served == kinds * len(accuracy.HEADS)


LEFT_OUT = "left out: kernel=torch: must be one that takes several documents in one call"


def test_a_wrong_tile_is_seen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    passes = accuracy._passes

    def too_small(kernel, call, in_ring, *tensors):
        out, lse, dq, dk, dv = passes(kernel, call, in_ring, *tensors)
        return out, lse, dq * (0.97 if in_ring and kernel.name == "torch" else 1), dk, dv

    monkeypatch.setattr(accuracy, "_passes", too_small)
    assert accuracy.main([*SMOKE, "--kernels", "torch", "--out", str(tmp_path)]) == 1
    assert {row["verdict"] for row in table(tmp_path / "accuracy-bfloat16.csv")} == {"wrong", LEFT_OUT}


def test_gaps_are_where_nothing_runs() -> None:
    found = [gaps.Busy("a", 0, 10), gaps.Busy("b", 2, 4), gaps.Busy("c", 12, 13), gaps.Busy("d", 20, 21)]
    assert gaps.gaps(found) == [(7, "c", "d"), (2, "a", "c")]


def run_exact(rank: int, folder: str) -> list[str]:
    """On a worker."""
    options = argparse.Namespace(
        tokens=256, head_dim=32, dtype="bfloat16", device="cpu", kernel="auto", repeats=1, out=None, budget=None
    )
    ranks = Ranks(rank, 4, exact.dist.group.WORLD)
    rows = Rows("exact", ("scheme",), ("grid", *exact.NAMES, "seconds"), options, ranks=ranks)
    exact.measure(rows, options, ranks)
    forget_groups()
    return rows.verdicts


def test_ranks_on_one_card_are_exact(pools) -> None:
    pool: Pool = pools(4)
    for verdicts in pool.run(run_exact, ""):
        assert verdicts.count("ok") >= 10
        assert "wrong" not in verdicts


def test_training_may_be_twice_as_far_from_fp32_as_one_rank_is() -> None:
    near = {"1 rank, fp32": [4.0, 3.0], "1 rank": [4.0004, 3.0], "ring": [4.0, 3.0005], "usp": [3.9993, 3.0]}
    rows, right = parity.judge(near)
    assert right
    assert [row[-1] for row in rows] == ["", "", "ok", "ok"]
    rows, right = parity.judge(near | {"ring": [4.001, 3.0]})
    assert not right
    assert [row[-1] for row in rows] == ["", "", "wrong", "ok"]
    with pytest.raises(WallfacerError, match="must be the same number of losses for each run"):
        parity.judge(near | {"ring": [4.0, float("nan")]})


def test_layers_of_transformer_engine_are_trained_where_they_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parity.importlib.util, "find_spec", lambda name: object())
    assert parity.kinds(True, "bfloat16") == (parity.THEIRS, parity.OWN, parity.FP8)
    assert set(parity.kinds(True, "bfloat16")) == set(parity.LAYERS)
    assert parity.kinds(False, "bfloat16") == parity.kinds(True, "float32") == (parity.OWN,)
    monkeypatch.setattr(parity.importlib.util, "find_spec", lambda name: None)
    assert parity.kinds(True, "bfloat16") == (parity.OWN,)


def test_verdicts_of_host_memory() -> None:
    good = {"equal": True, "ratio": 1.02, "freed": 95, "expected": 100}
    assert on_host.verdict_of(**good) == "ok"
    assert on_host.verdict_of(**good | {"equal": False}).startswith("wrong")
    assert on_host.verdict_of(**good | {"ratio": 1.04}).startswith("over")
    assert on_host.verdict_of(**good | {"freed": 80}).startswith("over")


def test_the_longest_sequence_is_found_to_an_eighth() -> None:
    for most in (0, 8191, 8192, 20000, 100000, 131072):
        found = step.longest(lambda tokens, most=most: tokens <= most)
        assert found <= most < max(found * 9 / 8, step.FIRST), (most, found)


def test_a_step_that_needs_more_than_the_inventory_is_over() -> None:
    assert step.compared(1.05e9, 1e9, 1e9) == ("1.05", "1.00", "1.050", "ok")
    assert step.compared(1.11e9, 1e9, 1e9)[-1].startswith("over")
    assert step.compared(0.89e9, 1e9, 1e9)[-1].startswith("over")


def test_copies_under_kernels() -> None:
    ran = [
        Busy("attention", 0, 10),
        Busy("Memcpy DtoH (Device -> Pinned)", 5, 15, COPY),
        Busy("gemm", 8, 12),
        Busy("Memcpy DtoD (Device -> Device)", 20, 30, COPY),
        Busy("Memcpy HtoD (Pinned -> Device)", 40, 50, COPY),
    ]
    assert copies_under_kernels(ran) == pytest.approx(7 / 20)
    assert copies_under_kernels(ran[:1]) is None
