"""Compare two checkouts on the emulated cluster: ``python -m benchmarks.paired CHECKOUT SETTING ... --out DIR``.

``benchmarks.emulated`` runs in CHECKOUT and in this one by turns, each with its own ``.venv/bin/python``, so that a
machine that gets slower slows both. One row per setting and scheme: medians, their ratio, and the ratio of each turn.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median

from benchmarks.gpu.tables import markdown, table_rows

ROOT = Path(__file__).parents[1]
#: What ``run.json`` says of a run, and the seconds of each scheme's samples.
type Run = tuple[dict, dict[str, list[float]]]


def main(argv: Sequence[str] | None = None) -> int:
    """Run both checkouts and print the table; the exit code of a run that failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.paired", description=__doc__.partition("\n")[0])
    parser.add_argument("checkout", type=Path, help="root of the other checkout")
    parser.add_argument("settings", nargs="+", help="names of configurations that both have, e.g. c-2x4")
    parser.add_argument("--schemes", nargs="+", required=True, help="labels that both have")
    parser.add_argument("--turns", type=int, default=3, help="runs of each checkout (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=2, help="samples of each scheme in a run (default: %(default)s)")
    parser.add_argument("--out", type=Path, required=True, help="folder of the samples")
    arguments = parser.parse_args(argv)
    trees = {"other": arguments.checkout.resolve(), "this": ROOT}
    for turn in range(arguments.turns):
        # The order changes: a machine that warms up favours neither.
        for name in sorted(trees, reverse=bool(turn % 2)):
            for setting in arguments.settings:
                out = arguments.out.resolve() / setting / f"{turn}-{name}"
                options = ["--schemes", *arguments.schemes, "--repeats", str(arguments.repeats), "--out", str(out)]
                start = [".venv/bin/python", "-m", "benchmarks.emulated", f"benchmarks/configs/{setting}.yaml"]
                code = subprocess.run([*start, *options], cwd=trees[name], stdout=subprocess.DEVNULL).returncode
                if code:
                    print(f"benchmarks: error: {setting} in {trees[name]} ended with exit code {code}", file=sys.stderr)
                    return code
    print(report(arguments.out))
    return 0


def report(out: Path) -> str:
    """Markdown of the samples in a folder: versions of both checkouts, then a row per setting and scheme."""
    lines, rows = {}, []
    for setting in sorted(path for path in out.resolve().iterdir() if path.is_dir()):
        turns = list(_turns(setting))
        for about, _ in (sample for pair in turns for sample in pair):
            lines[f"{about['machine']}; {about['versions']}"] = None
        for scheme in turns[0][0][1]:
            other, this = ([run[scheme] for _, run in side] for side in zip(*turns, strict=True))
            medians = [median(second for run in side for second in run) for side in (other, this)]
            each = ", ".join(f"{median(b) / median(a):.3f}" for a, b in zip(other, this, strict=True))
            seconds = [f"{number:.3f}" for number in (*medians, medians[1] / medians[0])]
            rows.append((setting.name, scheme, *seconds, each))
    heading = ("setting", "scheme", "other checkout, s", "this checkout, s", "this over other", "in each turn")
    return "\n".join((*lines, "", markdown(heading, rows)))


def _turns(setting: Path) -> Iterator[tuple[Run, ...]]:
    """Yield ``run.json`` and the seconds of each scheme, of the other checkout's run and of this one's, per turn."""
    for number in range(len(list(setting.glob("*-this")))):
        yield tuple(_samples(setting / f"{number}-{name}") for name in ("other", "this"))


def _samples(run: Path) -> Run:
    seconds: dict[str, list[float]] = {}
    for row in table_rows(run / "samples.csv"):
        seconds.setdefault(row["scheme"], []).append(float(row["seconds"]))
    return json.loads((run / "run.json").read_text()), seconds


if __name__ == "__main__":
    sys.exit(main())
