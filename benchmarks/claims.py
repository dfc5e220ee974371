"""What a run of ``benchmarks/suite.sh`` shows: ``python -m benchmarks.claims OUT``. Exit code 1 if a claim fails."""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

Medians = dict[str, float]
#: Labels of this project's grids, of its double rings, of the paper's own scheme, and of the peers.
GRIDS, DOUBLE_RINGS, PUBLISHED, PEERS = ("u*",), ("double-ring-*", "u1-i4-c1-o4*"), ("wallfacer-*",), ("rfa-*", "usp-*")
FEW_HEADS = ("u1-*", "u2-*")


@dataclass(frozen=True)
class Claim:
    """One comparison.

    Attributes:
        setting: the configuration.
        text: what is compared.
        value: of the rows of a summary.
        limit: what the value must reach, or with ``at_most`` not exceed.
    """

    setting: str
    text: str
    value: Callable[[Sequence[dict[str, str]]], float]
    limit: float
    at_most: bool = False

    def holds(self, value: float) -> bool:
        """Whether the value is on the right side of the limit."""
        return value <= self.limit if self.at_most else value >= self.limit


def fastest(rows: Sequence[dict[str, str]], patterns: Sequence[str], but: Sequence[str] = ()) -> dict[str, str]:
    """The row with the least median among those that ran.

    Raises:
        SystemExit: none ran.
    """
    fits = [row for row in rows if row.get("median_s") and _fits(row, patterns) and not _fits(row, but)]
    if not fits:
        raise SystemExit(f"no row fits {', '.join(patterns)}")
    return min(fits, key=lambda row: float(row["median_s"]))


def _fits(row: dict[str, str], patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(row["scheme"], pattern) for pattern in patterns)


def speedup(ours: Sequence[str], theirs: Sequence[str]) -> Callable[[Sequence[dict[str, str]]], float]:
    """How many times as fast our fastest is; a double ring is not among the grids that it is compared with."""

    def value(rows: Sequence[dict[str, str]]) -> float:
        but = DOUBLE_RINGS if theirs == DOUBLE_RINGS else ()
        return float(fastest(rows, theirs)["median_s"]) / float(fastest(rows, ours, but)["median_s"])

    return value


def of_bound(rows: Sequence[dict[str, str]]) -> float:
    """The fastest of ours over max(compute, busiest link)."""
    best = fastest(rows, GRIDS)
    return float(best["median_s"]) / float(best["bound_s"])


def exposed(rows: Sequence[dict[str, str]]) -> float:
    """Exposed communication of the fastest of ours over that of the paper's own scheme at its best placement."""
    return float(fastest(rows, GRIDS)["exposed_s"]) / float(fastest(rows, PUBLISHED)["exposed_s"])


ANY = (*GRIDS, *DOUBLE_RINGS)
CLAIMS = (
    Claim("c-4x4", "best grid / bound", of_bound, 1.15, at_most=True),
    Claim("b-4x4", "best grid / bound", of_bound, 1.10, at_most=True),
    Claim("b-half-4x4", "best grid / bound", of_bound, 1.06, at_most=True),
    Claim("c-4x4", "fastest peer / best grid", speedup(GRIDS, PEERS), 1.25),
    Claim("c-4x4", "paper's scheme, best placement / best grid", speedup(GRIDS, PUBLISHED), 1.8),
    Claim("nic50-4x4", "fastest peer / best grid", speedup(GRIDS, PEERS), 1.3),
    Claim("c-4x4", "our double ring / best grid with head 1 or 2", speedup(FEW_HEADS, DOUBLE_RINGS), 1.12),
    *(
        Claim(f"{name}-4x4-gqa", "fastest peer / best of ours", speedup(ANY, PEERS), 0.98)
        for name in ("c", "nic50", "nic25")
    ),
    Claim("nic25-16x1-gqa", "our double ring / best grid", speedup(GRIDS, DOUBLE_RINGS), 1.15),
    Claim("c-2x4", "fastest peer / best of ours", speedup(ANY, PEERS), 0.98),
    Claim("c-4x2", "fastest peer / best of ours", speedup(ANY, PEERS), 0.98),
    Claim("b-4x4", "exposed: best grid / paper's scheme", exposed, 0.5, at_most=True),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Print every claim with what was measured."""
    (directory,) = sys.argv[1:] if argv is None else argv
    failed = 0
    print("| setting | compared | measured | wanted | |\n| --- | --- | --- | --- | --- |")
    for claim in CLAIMS:
        with (Path(directory) / claim.setting / "summary.csv").open(newline="") as file:
            value = claim.value(list(csv.DictReader(file)))
        holds = claim.holds(value)
        failed += not holds
        wanted = f"{'<=' if claim.at_most else '>='} {claim.limit:g}"
        print(
            f"| {claim.setting} | {claim.text} | {value:.3f} | {wanted} | {'holds' if holds else '**does not hold**'} |"
        )
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
