"""The command: draws every committed picture that needs no training; ``make demo`` draws the loss."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_wallfacer.plots.grid import draw_grid
from megatron_wallfacer.schedule.schemes import make_plan
from scripts.figures.measured import draw_measured

IMAGES = Path(__file__).parents[2] / "docs" / "images"


def main() -> None:
    """Draw into docs/images, or into another folder."""
    parser = argparse.ArgumentParser(prog="python -m scripts.figures", description=__doc__)
    parser.add_argument("--out", type=Path, default=IMAGES, metavar="DIR", help="folder (default: docs/images)")
    out: Path = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    draw_measured(out / "measured.png")
    draw_grid(make_plan("ring", 8), out / "ring.png")
    draw_grid(make_plan("team-ring", 8, team_size=2), out / "grid.png")
    draw_grid(make_plan("wallfacer", 16, team_size=2), out / "wallfacer.png")


if __name__ == "__main__":
    main()
