"""A usual Megatron job on one GPU: the flags that people turn on together, saved and resumed, against one rank.

    python -m benchmarks.gpu.jobs            4 ranks on the card: TP 2 x CP 2
    python -m benchmarks.gpu.jobs --smoke    anywhere, on CPU ranks, a few iterations

Sequence parallel, distributed optimizer, overlapped gradient reduction and full recomputation, in bf16 and in fp8
around an attention in bf16. Losses are judged as in :mod:`benchmarks.gpu.parity`. A resumed run must give the losses of
the run that went on. Logs and checkpoints stay in ``OUT/jobs``.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from benchmarks.gpu import parity
from benchmarks.gpu.report import add_options
from benchmarks.gpu.rows import LeftOut, Rows
from benchmarks.gpu.training import Trainer
from megatron_wallfacer.training_runs.loss_comparison import TOLERANCE, differences

RANKS = 4
USUAL = (
    "--tensor-model-parallel-size 2 --sequence-parallel --use-distributed-optimizer --overlap-grad-reduce "
    "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
).split()
KEEP = "--wallfacer-keep-attention-output"


class Job:
    """The usual job with one kind of layers.

    Args:
        runs: trains and judges.
        rows: table of the runs.
        layers: key of :data:`benchmarks.gpu.parity.LAYERS`.
        iterations: training iterations; the checkpoint is saved after half of them.
    """

    def __init__(self, runs: parity.Runs, rows: Rows, layers: str, iterations: int) -> None:
        self._runs, self._rows, self._layers, self._half = runs, rows, layers, iterations // 2
        self._checkpoint = runs.trainer.folder / f"checkpoint-{'fp8' if layers == parity.FP8 else 'bf16'}"
        # A checkpoint of an earlier run would stop this one.
        shutil.rmtree(self._checkpoint, ignore_errors=True)
        self._losses: list[float] = []

    def measure(self) -> None:
        """Rows: one rank, the job, the job resumed, the job with attention's output kept."""
        save = ("--save", str(self._checkpoint), "--save-interval", str(self._half), "--ckpt-format", "torch_dist")
        self._runs.compare(self._layers, {"usual job": self._split(*save)}, keep=self._losses)
        if self._layers == parity.FP8:
            return
        self._add("usual job, resumed", self._resumed)
        self._add("usual job, attention output kept", self._kept)

    def _split(self, *flags: str) -> parity.Split:
        return parity.Split(RANKS // 2, "team-ring", RANKS, (*USUAL, *flags))

    def _train(self, name: str, *flags: str) -> list[float]:
        flags = self._runs.flags(self._layers, self._split(*flags))
        return self._runs.trainer.losses(f"{self._layers} {name}", RANKS, flags)

    def _add(self, name: str, work: Callable[[], Iterator[tuple[str, ...]]]) -> None:
        self._rows.measure((self._layers, name), work, RANKS)

    def _resumed(self) -> Iterator[tuple[str, ...]]:
        if not self._losses:
            raise LeftOut("there is no saved run to resume")
        losses = self._train("resumed", "--load", str(self._checkpoint), "--ckpt-step", str(self._half))
        wanted = self._losses[self._half :]
        # Megatron 0.19 prints the second iteration of a process as the mean of its first two.
        yield self._row(losses[:1] + losses[2:], wanted[:1] + wanted[2:])

    def _kept(self) -> Iterator[tuple[str, ...]]:
        if not self._losses:
            raise LeftOut("there is no usual job to compare it with")
        yield self._row(self._train("kept", KEEP), self._losses)

    def _row(self, losses: Sequence[float], wanted: Sequence[float]) -> tuple[str, ...]:
        """Cells of a run that must give the losses of another."""
        if len(losses) != len(wanted):
            return f"{losses[-1]:.6f}", "-", "-", f"wrong: {len(losses)} iterations, not {len(wanted)}"
        apart = max(differences(wanted, losses))
        verdict = "ok" if apart <= TOLERANCE else "wrong"
        return f"{losses[-1]:.6f}", f"{apart:.1e}", f"{TOLERANCE:.1e}", verdict


def main(argv: Sequence[str] | None = None) -> int:
    """Train, compare; 1 where a run is further off than rounding explains, or a resumed one is another run."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add_options(parser)
    parser.add_argument("--backend", choices=("nccl", "gloo"), default="nccl", help="on a GPU (default: nccl)")
    options = parser.parse_args(argv)
    iterations = 4 if options.smoke else 10
    rows = Rows("jobs", ("layers", "run"), ("last loss", "apart", "allowed"), options)
    trainer = Trainer((options.out or Path("runs/gpu")) / "jobs", iterations, options)
    runs = parity.Runs(trainer, rows, options)
    train(runs, rows, iterations, options)
    if parity.FP8 not in parity.kinds(trainer.on_gpu, options.dtype):
        rows.add((parity.FP8, "usual job"), f"left out: {parity.NEEDS}")
    return rows.close()


def train(runs: parity.Runs, rows: Rows, iterations: int, options: argparse.Namespace) -> None:
    """The job with the most usual layers, and in fp8 where there is TransformerEngine."""
    possible = parity.kinds(runs.trainer.on_gpu, options.dtype)
    Job(runs, rows, possible[0], iterations).measure()
    if parity.FP8 in possible:
        Job(runs, rows, parity.FP8, iterations).measure()


if __name__ == "__main__":
    sys.exit(main())
