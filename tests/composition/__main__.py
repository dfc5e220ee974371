"""Prints the composition matrix.

python -m tests.composition [--iterations 20] [--only 3 17 ...] [--json FILE] [--jobs 2] [--list]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

from tests.composition.combination import Combination, combinations_of_cover
from tests.composition.matrix import Outcome, run_combination

HEADING = f"{'':>3} {'ranks':>5} {'dtype':<5} {'cp':>2} {'scheme':<11} {'loss':>8} {'allowed':>8} {'norm':>8}  verdict"


def main(argv: list[str] | None = None) -> int:
    """The exit code: 0 if every combination is right."""
    options = _parse(argv)
    chosen = [one for one in combinations_of_cover() if not options.only or one.number in options.only]
    if options.list:
        for one in chosen:
            print(f"{one.number:>3} {one.split.ranks:>5} {one.dtype:<5} {one.cp_size:>2} {one.scheme:<11} {one}")
        return 0
    started, outcomes = time.monotonic(), []
    print(f"{len(chosen)} combinations, {options.iterations} iterations each, {options.jobs} side by side")
    print(HEADING, flush=True)
    for outcome in _run(chosen, options.iterations, options.jobs):
        outcomes.append(outcome)
        print(as_line(outcome), flush=True)
        if options.json:
            options.json.write_text(json.dumps([one.as_json() for one in outcomes], indent=1) + "\n")
    print(summary(outcomes, time.monotonic() - started))
    return 0 if outcomes and all(outcome.good for outcome in outcomes) else 1


def as_line(outcome: Outcome) -> str:
    """One line of the table."""
    figures = " ".join(
        f"{'-' if value is None else format(value, '.1e'):>8}"
        for value in (outcome.loss, outcome.allowed, outcome.grad_norm)
    )
    return (
        f"{outcome.number:>3} {outcome.ranks:>5} {outcome.dtype:<5} {outcome.cp_size:>2} {outcome.scheme:<11} "
        f"{figures}  {outcome.verdict}: {outcome.features}"
    )


def summary(outcomes: Iterable[Outcome], seconds: float) -> str:
    """The last line."""
    outcomes = list(outcomes)
    good = sum(outcome.good for outcome in outcomes)
    counts = Counter(outcome.dtype for outcome in outcomes)
    worst = []
    for dtype in sorted(counts, reverse=True):
        differences = [one for one in outcomes if one.dtype == dtype and one.loss is not None]
        if differences:
            most = max(differences, key=lambda one: one.loss / one.allowed)
            worst.append(f"{dtype} {most.loss:.1e} of {most.allowed:.1e} (combination {most.number})")
    kinds = ", ".join(f"{count} {dtype}" for dtype, count in sorted(counts.items(), reverse=True))
    return (
        f"{good} of {len(outcomes)} combinations right ({kinds}); worst loss difference: "
        f"{'; '.join(worst) or 'none'}; {seconds / 60:.1f} minutes"
    )


def _run(chosen: list[Combination], iterations: int, jobs: int) -> Iterator[Outcome]:
    """Outcomes as they come. Each job has a rank server of its own."""
    # Not forked: the rank server of this process, if there is one, would be shared.
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        waiting = [pool.submit(run_combination, one, iterations) for one in chosen]
        for future in as_completed(waiting):
            yield future.result()


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.composition", description=__doc__.splitlines()[0])
    parser.add_argument("--iterations", type=int, default=20, help="of each run (default: 20)")
    parser.add_argument("--only", type=int, nargs="+", default=[], metavar="N", help="these combinations")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table there, too, line by line")
    parser.add_argument("--jobs", type=int, default=2, help="combinations side by side (default: 2)")
    parser.add_argument("--list", action="store_true", help="say what there is, run nothing")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
