"""What a measurement leaves: a printed table, CSV files, a plot, and where it was made."""

from __future__ import annotations

import csv
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.config import Config
from benchmarks.measure import Measurement, Result
from benchmarks.peers.loading import versions

_MB = 1e6
#: Relative error in fp32 beyond which a scheme does not compute attention.
_EXACT = 1e-4
HEADINGS = (
    "scheme",
    "samples",
    "median s",
    "min - max",
    "of bound",
    "bound s",
    "exposed s",
    "waiting",
    "link s",
    "MB sent a rank",
    "inter-node MB mean (max)",
    "CPU s",
    "worst error",
    "remarks",
)


def table(results: Sequence[Result]) -> str:
    """Markdown, fastest first, then what could not run."""
    ran = sorted((result for result in results if result.samples), key=lambda result: result.median_s)
    rows = [HEADINGS, ("---",) * len(HEADINGS), *(_row(result) for result in ran)]
    blank = ("-",) * (len(HEADINGS) - 2)
    rows += [(result.label, *blank, f"cannot run: {result.problem}") for result in results if result.problem]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _row(result: Result) -> tuple[str, ...]:
    times = [sample.seconds for sample in result.samples]
    counted, traffic = result.counted, result.planned or result.counted
    inter = counted.inter_sent
    return (
        result.label,
        str(len(times)),
        f"{result.median_s:.3f}",
        f"{min(times):.3f} - {max(times):.3f}",
        f"{result.median_s / result.bound_s:.2f}",
        f"{result.bound_s:.3f}",
        f"{result.exposed_s:.3f}",
        "-" if result.waiting is None else f"{result.waiting:.1%}",
        f"{traffic.link_s:.3f}",
        f"{_mean(counted.sent) / _MB:.1f}",
        f"{_mean(inter) / _MB:.1f} ({max(inter) / _MB:.1f})",
        _cpu(result),
        f"{result.worst_error:.1e}",
        remarks(result),
    )


def _cpu(result: Result) -> str:
    """Processor seconds of all ranks, and how many times those of one single-process call that is."""
    mean, single = _mean(sample.cpu_s for sample in result.samples), result.alone.single_s
    return f"{mean:.2f}" if single is None else f"{mean:.2f} ({mean / single:.2f}x)"


def remarks(result: Result) -> str:
    """What a reader has to know of a row."""
    disturbed = sum(sample.disturbed for sample in result.samples)
    found = [result.note] if result.note else []
    if result.worst_error > _EXACT:
        found.append("**wrong**: its times mean nothing")
    if disturbed:
        found.append(f"{disturbed} of {len(result.samples)} samples disturbed by other load")
    return "; ".join(found)


def surroundings(config: Config) -> dict[str, Any]:
    """Command, setting, machine, versions."""
    return {
        "command": shlex.join(["python", "-m", "benchmarks.emulated", *sys.argv[1:]]),
        "setting": asdict(config),
        "machine": machine(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            **versions(),
            "repository": _git("describe", "--always", "--dirty"),
        },
    }


def machine() -> str:
    """Processor, cores, kernel."""
    models = [line.split(":", 1)[1].strip() for line in _lines(Path("/proc/cpuinfo")) if line.startswith("model name")]
    return f"{models[0] if models else platform.machine()}, {os.cpu_count()} cores, Linux {platform.release()}"


def write(directory: Path, config: Config, about: dict[str, Any], measurement: Measurement) -> None:
    """``run.json``, ``samples.csv``, ``summary.csv``, ``table.md`` and ``times.png``."""
    directory.mkdir(parents=True, exist_ok=True)
    results, about = measurement.results, about | {"goodput_mbit": measurement.goodput}
    if measurement.processors is not None:
        about |= {"processors": asdict(measurement.processors)}
    (directory / "run.json").write_text(json.dumps(about, indent=2) + "\n")
    (directory / "table.md").write_text(table(results) + "\n")
    _write_csv(directory / "samples.csv", _sample_rows(results))
    _write_csv(directory / "summary.csv", [_summary(result) for result in results])
    from benchmarks.plot import draw_times

    draw_times(directory / "times.png", config, results)


def _sample_rows(results: Sequence[Result]) -> list[dict[str, Any]]:
    return [
        {"scheme": result.label, "turn": turn, **asdict(sample)}
        for result in results
        for turn, sample in enumerate(result.samples)
    ]


def _summary(result: Result) -> dict[str, Any]:
    row: dict[str, Any] = {
        "scheme": result.label,
        "problem": result.problem or "",
        "compute_s": result.alone.rank_s,
    }
    if not result.samples:
        return row
    times = [sample.seconds for sample in result.samples]
    row |= {
        "samples": len(times),
        "median_s": result.median_s,
        "min_s": min(times),
        "max_s": max(times),
        "bound_s": result.bound_s,
    }
    row |= {"forward_median_s": result.forward_s, "exposed_s": result.exposed_s, "waiting": result.waiting}
    row["cpu_s_mean"] = _mean(sample.cpu_s for sample in result.samples)
    row["single_call_cpu_s"] = result.alone.single_s
    row["disturbed"] = sum(sample.disturbed for sample in result.samples)
    for name, traffic in (("counted", result.counted), ("planned", result.planned)):
        if traffic is not None:
            row[f"{name}_sent_mean"] = _mean(traffic.sent)
            row[f"{name}_inter_mean"] = _mean(traffic.inter_sent)
            row[f"{name}_inter_max"] = max(traffic.inter_sent)
            row[f"{name}_link_s"] = traffic.link_s
    row |= {f"error_{name}": error for name, error in result.errors.items()}
    return row | {"check_dtype": result.check_dtype, "remarks": remarks(result)}


def _write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def _mean(numbers: Iterable[float]) -> float:
    values = list(numbers)
    return sum(values) / len(values)


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def _git(*arguments: str) -> str:
    where = Path(__file__).resolve().parent
    done = subprocess.run(["git", "-C", str(where), *arguments], capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"
