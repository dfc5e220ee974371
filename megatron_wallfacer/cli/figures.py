"""Tables of ``wallfacer simulate --figure`` and ``--field``: published beside predicted."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict

from megatron_wallfacer.planning.field import Measured, pairs_in_order, replay_field
from megatron_wallfacer.planning.figures import READINGS, Better, Case, better, replay, summary

#: Printed in full; of the others the summary.
MAIN = "each"


def figure_text(figure: int, *, as_json: bool = False) -> str:
    """A figure of the paper.

    Args:
        figure: 7 or 9.
        as_json: instead of a table.

    Raises:
        OptionError: another figure.
    """
    found = {reading: replay(figure, reading) for reading in READINGS}
    chosen = [better(case) for case in found[MAIN]] if figure == 7 else []
    if as_json:
        return json.dumps(
            {
                "cases": [_case_fields(case) for case in found[MAIN]],
                "summaries": {reading: asdict(summary(cases)) for reading, cases in found.items()},
                "planner": [_better_fields(one) for one in chosen],
            },
            indent=2,
        )
    lines = [
        f"Figure {figure} of the WallFacer paper: 1000 tokens/s of all devices, and the gain over the ring.",
        f"{'case':<26} {'scheme':<15} {'paper':>6} {'ours':>6} {'gain paper':>11} {'ours':>7}  best C",
        *(line for case in found[MAIN] for line in _case_lines(case)),
        "",
        "Which placement a bar has is not said. Summaries by reading (docs/paper.md):",
        *(f"  {reading:<15} {summary(cases)}" for reading, cases in found.items()),
    ]
    return "\n".join(lines + (["", *_better_lines(chosen)] if chosen else []))


def field_text(*, as_json: bool = False) -> str:
    """Other systems' attention, a table or JSON."""
    found = sorted(replay_field(), key=lambda one: (one.tokens, -one.published))
    right, pairs = pairs_in_order(found)
    if as_json:
        return json.dumps({"points": [asdict(one) for one in found], "right": right, "pairs": pairs}, indent=2)
    lines = [
        "Attention of other systems on 4 x 8 A800, causal, 40 heads x 128: TFLOP/s of a device. Nothing is fitted.",
        f"{'tokens':>7}  {'scheme':<16} {'published':>9} {'ours':>6}  order",
        *_field_lines(found),
        f"order right for {right} of {pairs} pairs at the same length",
    ]
    return "\n".join(lines)


def _case_lines(case: Case) -> Iterable[str]:
    for scheme, rate in case.paper.items():
        line = f"{case.name:<26} {scheme:<15} {rate:>6.2f} {case.ours[scheme]:>6.2f}"
        if scheme != "ring":
            line += f" {case.gain(scheme, paper=True):>+9.1f} % {case.gain(scheme, paper=False):>+5.1f} %"
            mark = _mark(case) if case.ours[scheme] == _best(case) else ""
            line += f"  {mark}"
        yield line.rstrip()


def _mark(case: Case) -> str:
    """Whether the best C is the paper's; for figure 9, which does not say, which it is."""
    if case.figure == 9:
        return case.placements["wallfacer-best"]
    return "right" if case.best_is_right else "WRONG"


def _best(case: Case) -> float:
    return max(rate for scheme, rate in case.ours.items() if scheme != "ring")


def _better_lines(chosen: Iterable[Better]) -> Iterable[str]:
    yield "The planner's grid instead of the paper's best: attention alone, as the paper's software overlaps and as"
    yield "streams allow; and the whole step, 1000 tokens/s."
    yield f"{'case':<26} {'grid, nearest axis first':<44} {'paper':>6} {'full':>6}  step"
    for one in chosen:
        ratios = f"{one.paper_s / one.ours_s:>5.2f}x {one.paper_overlapped_s / one.ours_overlapped_s:>5.2f}x"
        step = f"{one.paper_k_tokens_s:.2f} -> {one.ours_k_tokens_s:.2f}"
        yield f"{one.case.name:<26} {_grid(one):<44} {ratios}  {step}"
        yield f"{'':<26} {one.reason}"


def _grid(one: Better) -> str:
    grid = one.choice.plan.grid
    return " x ".join(f"{axis} {grid.size_of(axis)}" for axis in grid.placement)


def _field_lines(found: list[Measured]) -> Iterable[str]:
    for tokens in dict.fromkeys(one.tokens for one in found):
        same = [one for one in found if one.tokens == tokens]
        places = sorted(same, key=lambda one: -one.predicted)
        for place, one in enumerate(same):
            ours = places.index(one)
            mark = "" if ours == place else f"published {place + 1}, ours {ours + 1}"
            line = f"{tokens // 1024:>6}K  {one.scheme:<16} {one.published:>9.1f} {one.predicted:>6.1f}  {mark}"
            yield line.rstrip()


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
