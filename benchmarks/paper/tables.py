"""Tables of published and predicted results, as text or JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict

from benchmarks.paper.burst_engine import AttentionRate, attention_rates, pairs_in_order
from benchmarks.paper.scaling import scaling_rows
from benchmarks.paper.throughput import READINGS, Case, PlannerGrid, planner_grid, simulate_figure, summary
from benchmarks.paper.usp import PUBLISHED_MFU, usp_steps
from megatron_wallfacer.cli.table import as_json as rows_as_json
from megatron_wallfacer.cli.table import show_table
from megatron_wallfacer.planning.cluster import Cluster
from megatron_wallfacer.planning.report import number

#: Reading that is printed in full; of the others a summary is printed.
MAIN = "each"


def print_figure(number: int, *, as_json: bool = False) -> None:
    """Print figure 7 or 9 of the paper, as tables or JSON."""
    cases = {reading: simulate_figure(number, reading) for reading in READINGS}
    grids = [planner_grid(case) for case in cases[MAIN]] if number == 7 else []
    if as_json:
        result = {
            "cases": [_case_fields(case) for case in cases[MAIN]],
            "summaries": {reading: asdict(summary(read)) for reading, read in cases.items()},
            "planner": [_planner_fields(grid) for grid in grids],
        }
        print(json.dumps(result, indent=2))
        return
    print(f"Figure {number} of the WallFacer paper: 1000 tokens/s of all devices; gains over the ring, percent.")
    headings = ("case", "scheme", ">paper", ">ours", ">gain paper", ">gain ours", "best C")
    show_table(headings, (row for case in cases[MAIN] for row in _case_rows(case)))
    print("\nThe paper does not state the placement of a bar. Summaries by reading (docs/paper.md):")
    for reading, read in cases.items():
        print(f"  {reading:<15} {summary(read)}")
    if grids:
        print("\nThe planner's grid instead of the paper's best. Speedup of attention with the overlap of the paper's")
        print("program, and with all overlap that streams allow; and the whole step, 1000 tokens/s.")
        show_table(("case", "grid, fastest varying first", ">paper", ">full", "step", "why"), map(_planner_row, grids))


def print_others(*, as_json: bool = False) -> None:
    """Print BurstEngine's attention rates and USP's training step, as tables or JSON."""
    steps = usp_steps()
    rates = sorted(attention_rates(), key=lambda rate: (rate.tokens, -rate.published))
    right, pairs = pairs_in_order(rates)
    if as_json:
        usp = {"published_mfu": PUBLISHED_MFU, "steps": [asdict(step) for step in steps]}
        points = [asdict(rate) for rate in rates]
        print(json.dumps({"points": points, "right": right, "pairs": pairs, "usp": usp}, indent=2))
        return
    print("Attention of other systems on 4 x 8 A800, causal, 40 heads x 128: TFLOP/s per device. Nothing is fitted.")
    show_table((">tokens", "scheme", ">published", ">ours", "order"), _rate_rows(rates))
    print(f"order right for {right} of {pairs} pairs at the same length")
    print("\nUSP's training step, Llama 3 8B, 208K tokens, 2 x 8 A800. Nothing is fitted.")
    headings = ("recomputed", ">published MFU %", ">predicted MFU %", ">s", ">GB per rank", "80 GB")
    rows = (
        (
            step.recompute,
            number(100 * PUBLISHED_MFU, 0),
            number(100 * step.mfu, 1),
            number(step.seconds, 1),
            number(step.memory_gb, 1),
            "fits" if step.fits else "does not fit",
        )
        for step in steps
    )
    show_table(headings, rows)


def print_scaling(cluster: Cluster, *, as_json: bool = False) -> None:
    """Print the predicted time of a layer by cluster size, as a table or JSON."""
    rows = list(scaling_rows(cluster))
    if as_json:
        print(rows_as_json(rows))
        return
    headings = ("", ">devices", ">tokens", ">s", ">of kernels", "grid", "fastest varying first", "bound by")
    cells = (
        (
            row.attention,
            str(row.devices),
            str(row.tokens),
            number(row.seconds, 3),
            number(row.seconds / row.kernel_s, 3),
            row.grid,
            ", ".join(row.placement),
            row.bound_by,
        )
        for row in rows
    )
    show_table(headings, cells)


def _case_rows(case: Case) -> Iterator[tuple[str, ...]]:
    best = max(rate for scheme, rate in case.ours.items() if scheme != "ring")
    for scheme, rate in case.paper.items():
        gains, mark = ("", ""), ""
        if scheme != "ring":
            gains = tuple(f"{case.gain(scheme, paper=paper):+.1f}" for paper in (True, False))
            mark = _best_size(case) if case.ours[scheme] == best else ""
        yield case.name, scheme, number(rate), number(case.ours[scheme]), *gains, mark


def _best_size(case: Case) -> str:
    """Return whether the best team size is the paper's. Figure 9 does not state it, so return which one it is."""
    if case.figure == 9:
        return case.placements["wallfacer-best"]
    return "right" if case.best_is_right else "WRONG"


def _planner_row(row: PlannerGrid) -> tuple[str, ...]:
    speedups = number(row.paper_s / row.ours_s), number(row.paper_overlapped_s / row.ours_overlapped_s)
    step = f"{row.paper_k_tokens_s:.2f} -> {row.ours_k_tokens_s:.2f}"
    return row.case.name, _grid(row), *speedups, step, row.reason


def _grid(row: PlannerGrid) -> str:
    grid = row.choice.plan.grid
    return " x ".join(f"{axis} {grid.size_of(axis)}" for axis in grid.placement)


def _rate_rows(rates: Sequence[AttentionRate]) -> Iterable[tuple[str, ...]]:
    for tokens in dict.fromkeys(rate.tokens for rate in rates):
        published = [rate for rate in rates if rate.tokens == tokens]
        predicted = sorted(published, key=lambda rate: -rate.predicted)
        for place, rate in enumerate(published):
            ours = predicted.index(rate)
            mark = "" if ours == place else f"published {place + 1}, ours {ours + 1}"
            yield f"{tokens // 1024}K", rate.scheme, number(rate.published, 1), number(rate.predicted, 1), mark


def _case_fields(case: Case) -> dict:
    gains = {name: case.gain(name, paper=False) for name in case.paper if name != "ring"}
    return {
        "case": case.name,
        "paper": case.paper,
        "ours": case.ours,
        "placements": case.placements,
        "gain_percent": gains,
        "best_is_right": case.best_is_right,
    }


def _planner_fields(row: PlannerGrid) -> dict:
    return {
        "case": row.case.name,
        "paper_scheme": row.paper_scheme,
        "grid": _grid(row),
        "attention_s": {"paper": row.paper_s, "ours": row.ours_s},
        "attention_overlapped_s": {"paper": row.paper_overlapped_s, "ours": row.ours_overlapped_s},
        "k_tokens_s": {"paper": row.paper_k_tokens_s, "ours": row.ours_k_tokens_s},
        "reason": row.reason,
    }
