"""The demonstration's model on one GPU: Megatron as it is on one rank, and split over ranks that share the card.

    python -m benchmarks.gpu.parity            the card; minutes
    python -m benchmarks.gpu.parity --smoke    anywhere, on CPU ranks, a few iterations

Losses are compared with those of one rank in fp32. A split run may be twice as far from them as Megatron as it is, on
one rank and in the same dtype: its rounding is no better. So it is with Megatron's own layers; where TransformerEngine
is installed with its layers, too, and with those in fp8 around an attention in bf16. Logs stay in ``OUT/parity``.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.gpu.report import add_options
from benchmarks.gpu.rows import LeftOut, Rows
from benchmarks.gpu.training import Trainer
from megatron_wallfacer.training_runs.loss_comparison import EXACT, WHOLE, compare, differences

ITERATIONS, RANKS = 20, 4
#: Megatron's flags for each kind of layers; a GPU needs more, by the libraries that are there.
OWN, THEIRS, FP8 = "Megatron's layers", "TransformerEngine's layers", "TransformerEngine's layers in fp8"
_THEIRS = ("--transformer-impl", "transformer_engine")
LAYERS = {
    OWN: ("--transformer-impl", "local"),
    THEIRS: _THEIRS,
    FP8: (*_THEIRS, "--fp8-format", "hybrid"),
}
NEEDS = "it needs a GPU, bf16 or fp16, and TransformerEngine"
FLAGS = {"bfloat16": ("--bf16",), "float16": ("--fp16",), "float32": ()}


@dataclass(frozen=True)
class Split:
    """A run on several ranks.

    Attributes:
        cp_size: context-parallel ranks.
        scheme: value of ``--wallfacer-scheme``.
        ranks: ranks in all.
        flags: Megatron's flags besides.
    """

    cp_size: int
    scheme: str
    ranks: int
    flags: tuple[str, ...] = ()


def splits(ranks: int) -> dict[str, Split]:
    """Split runs that every kind of layers has, by name."""
    return {
        f"cp {ranks}, team-ring": Split(ranks, "team-ring", ranks),
        "tp 2 x cp 2": Split(2, "team-ring", 4, ("--tensor-model-parallel-size", "2")),
    }


def graph_splits(ranks: int, layers: str) -> dict[str, Split]:
    """Split runs with CUDA graphs, by name: the plugin's, and Megatron's around attention.

    Args:
        ranks: context-parallel ranks.
        layers: key of :data:`LAYERS`; Megatron's graphs need TransformerEngine's random numbers.
    """
    flags_of = {"graphs": ("--wallfacer-cuda-graphs",)}
    if layers == THEIRS:
        flags_of["graphs of layers"] = ("--cuda-graph-impl", "local")
    return {
        f"cp {ranks}, team-ring, {name}": Split(ranks, "team-ring", ranks, flags) for name, flags in flags_of.items()
    }


def split_arguments(ranks: int, scheme: str, kernel: str, *, on_gpu: bool, backend: str = "nccl") -> list[str]:
    """The plugin's flags of a split run; over gloo the ranks that share a GPU send through host memory."""
    split = f"--wallfacer-cp-size {ranks} --wallfacer-scheme {scheme} --wallfacer-kernel {kernel}".split()
    staged = "--distributed-backend gloo --wallfacer-transfers staged".split()
    return [*split, *(staged if on_gpu and backend == "gloo" else ())]


def main(argv: Sequence[str] | None = None) -> int:
    """Train, compare; 1 where a loss is further off than rounding explains."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add_options(parser)
    parser.add_argument("--backend", choices=("nccl", "gloo"), default="nccl", help="on a GPU (default: nccl)")
    options = parser.parse_args(argv)
    ranks, iterations = (2, 2) if options.smoke else (RANKS, ITERATIONS)
    rows = Rows("parity", ("layers", "run"), ("last loss", "apart", "allowed"), options)
    runs = Runs(Trainer((options.out or Path("runs/gpu")) / "parity", iterations, options), rows, options)
    train(runs, ranks, options)
    for layers in LAYERS:
        if layers not in kinds(runs.trainer.on_gpu, options.dtype):
            rows.add((layers, "all"), f"left out: {NEEDS}")
    return rows.close()


def train(runs: Runs, ranks: int, options: argparse.Namespace) -> None:
    """Every run, most important first; the schemes besides the default last, and not in a smoke run."""
    for layers in kinds(runs.trainer.on_gpu, options.dtype):
        runs.compare(layers, splits(ranks))
    if runs.trainer.on_gpu and options.backend == "nccl":
        first = kinds(runs.trainer.on_gpu, options.dtype)[0]
        runs.compare(first, graph_splits(ranks, first))
    if not options.smoke:
        runs.compare(OWN, {f"cp {ranks}, {scheme}": Split(ranks, scheme, ranks) for scheme in ("ring", "ulysses")})


def kinds(on_gpu: bool, dtype: str) -> tuple[str, ...]:
    """The kinds of layers that there can be here, most important first."""
    theirs = on_gpu and dtype != "float32" and importlib.util.find_spec("transformer_engine") is not None
    return (THEIRS, OWN, FP8) if theirs else (OWN,)


class Runs:
    """Trains on one rank and split, a row for each run as it ends.

    Args:
        trainer: starts the runs and keeps their logs.
        rows: table of the runs.
        options: dtype, kernel and backend.
    """

    def __init__(self, trainer: Trainer, rows: Rows, options: argparse.Namespace) -> None:
        self.trainer, self._rows, self._options = trainer, rows, options
        #: Losses of one rank by layers; those in fp32 under :data:`EXACT`. None if the run failed.
        self._single: dict[str, list[float] | None] = {}
        self._last: list[float] = []

    def flags(self, layers: str, split: Split | None = None) -> list[str]:
        """Flags of a run with such layers: on one rank, or split."""
        common = [*FLAGS[self._options.dtype], *LAYERS[layers]]
        if split is None:
            return common
        options, on_gpu = self._options, self.trainer.on_gpu
        ours = split_arguments(split.cp_size, split.scheme, options.kernel, on_gpu=on_gpu, backend=options.backend)
        return [*common, *split.flags, *ours]

    def compare(self, layers: str, splits: Mapping[str, Split], keep: list[float] | None = None) -> None:
        """Train one rank with such layers, then every split run; one rank in fp32 comes before the first.

        Args:
            layers: key of :data:`LAYERS`.
            splits: split runs by name.
            keep: takes the losses of the last split run; none if it failed.
        """
        self._run_single(EXACT, OWN, LAYERS[OWN])
        self._run_single(layers, layers, self.flags(layers))
        for name, split in splits.items():
            self._run_split(layers, name, split)
            if keep is not None:
                keep[:] = self._last

    def _run_single(self, key: str, layers: str, flags: Sequence[str]) -> None:
        """One rank, unless it has run."""
        if key in self._single:
            return
        self._single[key] = None
        name = EXACT if key == EXACT else WHOLE

        def work() -> Iterator[tuple[str, ...]]:
            losses = self._single[key] = self.trainer.losses(f"{layers} {name}", 1, flags)
            exact = self._single[EXACT]
            yield f"{losses[-1]:.6f}", f"{max(differences(exact, losses)):.1e}" if exact else "-", "", ""

        self._rows.measure((layers, name), work)

    def _run_split(self, layers: str, name: str, split: Split) -> None:
        def work() -> Iterator[tuple[str, ...]]:
            self._last = []
            exact, whole = self._single[EXACT], self._single[layers]
            if exact is None or whole is None:
                raise LeftOut("there is no run of 1 rank to compare it with")
            losses = self._last = self.trainer.losses(f"{layers} {name}", split.ranks, self.flags(layers, split))
            judged, _ = judge({EXACT: exact, WHOLE: whole, name: losses})
            yield next(row[1:] for row in judged if row[0] == name)

        self._rows.measure((layers, name), work, split.ranks)


def judge(losses: Mapping[str, Sequence[float]]) -> tuple[list[tuple[str, ...]], bool]:
    """A row for each run, and whether all are right.

    Args:
        losses: by run, :data:`EXACT` and :data:`WHOLE` among them; as many of each.

    Raises:
        WallfacerError: a run has fewer iterations than the others, or a loss that is no number.
    """
    comparison = compare(losses[EXACT], losses[WHOLE], losses)
    rows, right = [], True
    for name, run in losses.items():
        judged, agrees = name not in (EXACT, WHOLE), comparison.agrees(name)
        right &= not judged or agrees
        verdict = ("ok" if agrees else "wrong") if judged else ""
        allowed = f"{comparison.allowed:.1e}" if judged else ""
        rows.append((name, f"{run[-1]:.6f}", f"{comparison.largest(name):.1e}", allowed, verdict))
    return rows, right


if __name__ == "__main__":
    sys.exit(main())
