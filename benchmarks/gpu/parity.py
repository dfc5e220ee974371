"""The demonstration's model on one GPU: Megatron as it is on one rank, and split over ranks that share the card.

    python -m benchmarks.gpu.parity            the card; minutes
    python -m benchmarks.gpu.parity --smoke    anywhere, on two CPU ranks, a few iterations

Losses are compared with those of one rank in fp32. A split run may be twice as far from them as Megatron as it is, on
one rank and in the same dtype: its rounding is no better.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.gpu.report import add_options, device_of, markdown, save
from megatron_wallfacer.cli.demo import train, training_arguments
from megatron_wallfacer.cli.pictures.loss import TOLERANCE, differences
from megatron_wallfacer.errors import WallfacerError
from megatron_wallfacer.shipped import SCRIPT

SCHEMES = ("team-ring", "ring", "ulysses")
ITERATIONS, RANKS = 20, 4
EXACT, WHOLE = "1 rank, fp32", "1 rank"
ALLOWED = 2.0
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
    with tempfile.TemporaryDirectory() as folder:
        losses = measure(Path(folder), ranks, iterations, options, on_gpu=on_gpu)
    rows, right = judge(losses)
    title = f"{options.dtype}, {iterations} iterations, {ranks} ranks against {WHOLE}"
    save(options.out, "parity", f"{title}\n\n{markdown(('run', 'last loss', 'apart', 'allowed', 'verdict'), rows)}")
    return int(not right)


def measure(
    folder: Path, ranks: int, iterations: int, options: argparse.Namespace, *, on_gpu: bool
) -> dict[str, list[float]]:
    """Losses of each run, by its name.

    Raises:
        WallfacerError: one failed; with the last lines of its log.
    """
    exact = training_arguments(folder, iterations)
    common = [*exact, *FLAGS[options.dtype]]
    shared = ["--distributed-backend", "gloo", "--wallfacer-transfers", "staged"] if on_gpu else []
    found = {EXACT: _losses(folder, 1, exact), WHOLE: _losses(folder, 1, common)}
    for scheme in SCHEMES:
        split = ["--wallfacer-cp-size", str(ranks), "--wallfacer-scheme", scheme, "--wallfacer-kernel", options.kernel]
        found[scheme] = _losses(folder, ranks, [*common, *split, *shared])
    return found


def _losses(folder: Path, ranks: int, arguments: Sequence[str]) -> list[float]:
    return [one.loss for one in train(SCRIPT, ranks, arguments, folder / "log", lambda iteration: None)]


def judge(losses: Mapping[str, Sequence[float]]) -> tuple[list[tuple[str, ...]], bool]:
    """A row for each run, and whether all are right.

    Args:
        losses: by run, :data:`EXACT` and :data:`WHOLE` among them; as many of each.

    Raises:
        WallfacerError: a run has fewer iterations than the others, or a loss that is no number.
    """
    if len({len(run) for run in losses.values()}) != 1 or any(one != one for run in losses.values() for one in run):
        raise WallfacerError(f"losses={dict(losses)}: must be as many numbers of each run")
    apart = {name: max(differences(losses[EXACT], run)) for name, run in losses.items()}
    # Any two orders of sums in fp32 may differ by the demonstration's own tolerance.
    allowed = max(ALLOWED * apart[WHOLE], TOLERANCE)
    rows, right = [], True
    for name, run in losses.items():
        judged = name not in (EXACT, WHOLE)
        right &= not judged or apart[name] <= allowed
        verdict = ("ok" if apart[name] <= allowed else "wrong") if judged else ""
        rows.append((name, f"{run[-1]:.6f}", f"{apart[name]:.1e}", f"{allowed:.1e}" if judged else "", verdict))
    return rows, right


if __name__ == "__main__":
    sys.exit(main())
