"""The demonstration's model on one GPU: Megatron as it is on one rank, and split over ranks that share the card.

    python -m benchmarks.gpu.parity            the card; minutes
    python -m benchmarks.gpu.parity --smoke    anywhere, on two CPU ranks, a few iterations

Losses are compared with those of one rank in fp32. A split run may be twice as far from them as Megatron as it is, on
one rank and in the same dtype: its rounding is no better. So it is with Megatron's own layers; where TransformerEngine
is installed with its layers, too, and with those in fp8 around an attention in bf16.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.gpu.report import add_options, device_of, markdown, save
from megatron_wallfacer.cli.comparison import EXACT, WHOLE, compare
from megatron_wallfacer.cli.demo import train, training_arguments
from megatron_wallfacer.megatron.needed_arguments import Libraries, complete_for_gpu
from megatron_wallfacer.shipped import SCRIPT

SCHEMES = ("team-ring", "ring", "ulysses")
ITERATIONS, RANKS = 20, 4
#: Megatron's flags for each kind of layers; a GPU needs more, by the libraries that are there.
OWN = "Megatron's layers"
_THEIRS = ("--transformer-impl", "transformer_engine")
LAYERS = {
    OWN: ("--transformer-impl", "local"),
    "TransformerEngine's layers": _THEIRS,
    "TransformerEngine's layers in fp8": (*_THEIRS, "--fp8-format", "hybrid"),
}
FLAGS = {"bfloat16": ("--bf16",), "float16": ("--fp16",), "float32": ()}


def main(argv: Sequence[str] | None = None) -> int:
    """Train, compare; 1 where a loss is further off than rounding explains."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add_options(parser)
    options = parser.parse_args(argv)
    on_gpu = device_of(options).type == "cuda"
    if not on_gpu:
        # Said on purpose, where there is a GPU: the launcher takes it otherwise.
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    ranks, iterations = (2, 2) if options.smoke else (RANKS, ITERATIONS)
    tables, right = [], True
    with tempfile.TemporaryDirectory() as folder:
        run = Runs(Path(folder), ranks, iterations, options, on_gpu=on_gpu)
        for name in kinds(on_gpu, options.dtype):
            rows, good = judge(run.losses(name))
            right &= good
            title = f"{name}, {options.dtype}, {iterations} iterations, {ranks} ranks against {WHOLE}"
            tables.append(f"{title}\n\n{markdown(('run', 'last loss', 'apart', 'allowed', 'verdict'), rows)}")
    if len(tables) < len(LAYERS):
        tables.append("TransformerEngine's layers: left out, they need a GPU, bf16 or fp16, and the library.")
    save(options.out, "parity", "\n\n".join(tables))
    return int(not right)


def kinds(on_gpu: bool, dtype: str) -> tuple[str, ...]:
    """The kinds of layers that there can be here."""
    theirs = on_gpu and dtype != "float32" and importlib.util.find_spec("transformer_engine") is not None
    return tuple(LAYERS) if theirs else (OWN,)


class Runs:
    """Trains, on one rank and split.

    Args:
        folder: for data and logs.
        ranks: of a split run.
        iterations: of every run.
        options: dtype and kernel.
        on_gpu: the ranks share a card.
    """

    def __init__(self, folder: Path, ranks: int, iterations: int, options: argparse.Namespace, *, on_gpu: bool) -> None:
        self._log, self._ranks, self._options = folder / "log", ranks, options
        self._common = training_arguments(folder, iterations)
        self._on_gpu = on_gpu
        self._exact = self._train(1, LAYERS[OWN])

    def losses(self, layers: str) -> dict[str, list[float]]:
        """Losses of each run with such layers, by its name.

        Raises:
            WallfacerError: one failed; with the last lines of its log.
        """
        flags = (*FLAGS[self._options.dtype], *LAYERS[layers])
        found = {EXACT: self._exact, WHOLE: self._train(1, flags)}
        for scheme in SCHEMES if layers == OWN else SCHEMES[:1]:
            split = split_arguments(self._ranks, scheme, self._options.kernel, on_gpu=self._on_gpu)
            found[scheme] = self._train(self._ranks, (*flags, *split))
        return found

    def _train(self, ranks: int, flags: Sequence[str]) -> list[float]:
        arguments = [*self._common, *flags]
        if self._on_gpu:
            arguments = complete_for_gpu(arguments, Libraries.here())
        return [one.loss for one in train(SCRIPT, ranks, arguments, self._log, lambda iteration: None)]


def split_arguments(ranks: int, scheme: str, kernel: str, *, on_gpu: bool) -> list[str]:
    """The plugin's flags of a split run; on a GPU the ranks share one card."""
    split = f"--wallfacer-cp-size {ranks} --wallfacer-scheme {scheme} --wallfacer-kernel {kernel}".split()
    return [*split, *("--distributed-backend gloo --wallfacer-transfers staged".split() if on_gpu else ())]


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
