"""Tables of ``wallfacer simulate --figure`` and ``--field``: published beside predicted."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict

from megatron_wallfacer.cli.table import figure, show_table
from megatron_wallfacer.planning.field import Measured, pairs_in_order, replay_field
from megatron_wallfacer.planning.figures import READINGS, Better, Case, better, replay, summary
from megatron_wallfacer.planning.usp import PUBLISHED_MFU, usp_steps

#: Printed in full; of the others the summary.
MAIN = "each"


def show_figure(number: int, *, as_json: bool = False) -> None:
    """Print a figure of the paper.

    Args:
        number: 7 or 9.
        as_json: instead of a table.

    Raises:
        OptionError: another figure.
    """
    found = {reading: replay(number, reading) for reading in READINGS}
    chosen = [better(case) for case in found[MAIN]] if number == 7 else []
    if as_json:
        whole = {
            "cases": [_case_fields(case) for case in found[MAIN]],
            "summaries": {reading: asdict(summary(cases)) for reading, cases in found.items()},
            "planner": [_better_fields(one) for one in chosen],
        }
        print(json.dumps(whole, indent=2))
        return
    print(f"Figure {number} of the WallFacer paper: 1000 tokens/s of all devices; gains over the ring, percent.")
    headings = ("case", "scheme", ">paper", ">ours", ">gain paper", ">gain ours", "best C")
    show_table(headings, (row for case in found[MAIN] for row in _case_rows(case)))
    print("\nWhich placement a bar has is not said. Summaries by reading (docs/paper.md):")
    for reading, cases in found.items():
        print(f"  {reading:<15} {summary(cases)}")
    if chosen:
        print("\nThe planner's grid instead of the paper's best, how many times as fast: attention alone, with the")
        print("overlap of the paper's software and with all that streams allow; and the whole step, 1000 tokens/s.")
        show_table(("case", "grid, nearest axis first", ">paper", ">full", "step", "why"), map(_better_row, chosen))


def show_field(*, as_json: bool = False) -> None:
    """Print other systems' attention and USP's training step, tables or JSON."""
    steps = usp_steps()
    found = sorted(replay_field(), key=lambda one: (one.tokens, -one.published))
    right, pairs = pairs_in_order(found)
    if as_json:
        usp = {"published_mfu": PUBLISHED_MFU, "steps": [asdict(one) for one in steps]}
        points = [asdict(one) for one in found]
        print(json.dumps({"points": points, "right": right, "pairs": pairs, "usp": usp}, indent=2))
        return
    print("Attention of other systems on 4 x 8 A800, causal, 40 heads x 128: TFLOP/s of a device. Nothing is fitted.")
    show_table((">tokens", "scheme", ">published", ">ours", "order"), _field_rows(found))
    print(f"order right for {right} of {pairs} pairs at the same length")
    print("\nUSP's training step, Llama 3 8B, 208K tokens, 2 x 8 A800. Nothing is fitted.")
    headings = ("recomputed", ">published MFU %", ">predicted MFU %", ">s", ">GB per rank", "80 GB")
    rows = (
        (
            one.recompute,
            figure(100 * PUBLISHED_MFU, 0),
            figure(100 * one.mfu, 1),
            figure(one.seconds, 1),
            figure(one.memory_gb, 1),
            "fits" if one.fits else "does not fit",
        )
        for one in steps
    )
    show_table(headings, rows)


def _case_rows(case: Case) -> Iterable[tuple[str, ...]]:
    for scheme, rate in case.paper.items():
        gains, mark = ("", ""), ""
        if scheme != "ring":
            gains = tuple(f"{case.gain(scheme, paper=paper):+.1f}" for paper in (True, False))
            mark = _mark(case) if case.ours[scheme] == _best(case) else ""
        yield case.name, scheme, figure(rate), figure(case.ours[scheme]), *gains, mark


def _mark(case: Case) -> str:
    """Whether the best C is the paper's; for figure 9, which does not say, which it is."""
    if case.figure == 9:
        return case.placements["wallfacer-best"]
    return "right" if case.best_is_right else "WRONG"


def _best(case: Case) -> float:
    return max(rate for scheme, rate in case.ours.items() if scheme != "ring")


def _better_row(one: Better) -> tuple[str, ...]:
    ratios = figure(one.paper_s / one.ours_s), figure(one.paper_overlapped_s / one.ours_overlapped_s)
    step = f"{one.paper_k_tokens_s:.2f} -> {one.ours_k_tokens_s:.2f}"
    return one.case.name, _grid(one), *ratios, step, one.reason


def _grid(one: Better) -> str:
    grid = one.choice.plan.grid
    return " x ".join(f"{axis} {grid.size_of(axis)}" for axis in grid.placement)


def _field_rows(found: list[Measured]) -> Iterable[tuple[str, ...]]:
    for tokens in dict.fromkeys(one.tokens for one in found):
        same = [one for one in found if one.tokens == tokens]
        places = sorted(same, key=lambda one: -one.predicted)
        for place, one in enumerate(same):
            ours = places.index(one)
            mark = "" if ours == place else f"published {place + 1}, ours {ours + 1}"
            yield f"{tokens // 1024}K", one.scheme, figure(one.published, 1), figure(one.predicted, 1), mark


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


def _better_fields(one: Better) -> dict:
    return {
        "case": one.case.name,
        "paper_scheme": one.paper_scheme,
        "grid": _grid(one),
        "attention_s": {"paper": one.paper_s, "ours": one.ours_s},
        "attention_overlapped_s": {"paper": one.paper_overlapped_s, "ours": one.ours_overlapped_s},
        "k_tokens_s": {"paper": one.paper_k_tokens_s, "ours": one.ours_k_tokens_s},
        "reason": one.reason,
    }
