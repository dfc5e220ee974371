"""Predicting a run: how it is read, and how the prediction is judged."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import predict
from benchmarks.predict import Prediction, chosen_over_best, holds, main, rank_correlation

FAST = {
    "cores": 2,
    "copy_gbyte_s": 100.0,
    "messages": [{"size": size, "thread_us": 0.0, "transport_us": 0.0} for size in (1e5, 1e6)],
    "pass_us": 0.0,
    "attend_us": 0.0,
    "operation_us": 0.0,
    "late_us": 0.0,
    "idle_late_us": 0.0,
    "latency_us": 0.0,
}
SETTING = {
    "name": "small",
    "topology": {"nodes": 2, "ranks_per_node": 2, "nic": "rank", "inter_mbit": 80.0, "intra_mbit": 800.0},
    "shape": {"tokens": 1024, "heads": 4, "kv_heads": 4, "head_dim": 32, "dtype": "float32"},
    "compute": {"mode": "sleep", "gflops_per_rank": 10.0},
    "schemes": {"mine": {"scheme": "ring", "bidirectional": True}},
}


def write_run(folder: Path, seconds: dict[str, float], inter: float = 80.0, **processors: Any) -> Path:
    """What python -m benchmarks.emulated leaves, as far as it is read."""
    goodput = {"inter": inter, "intra": 800.0}
    about = {"setting": SETTING, "goodput_mbit": goodput, "processors": FAST | processors}
    (folder / "run.json").write_text(json.dumps(about))
    with (folder / "summary.csv").open("w") as file:
        table = csv.writer(file)
        table.writerow(["scheme", "problem", "median_s"])
        table.writerows([name, "", median] for name, median in seconds.items())
        table.writerow(["usp-8", "does not fit", ""])
    return folder


def test_our_schemes_are_predicted_and_peers_are_not(tmp_path: Path) -> None:
    run = write_run(tmp_path, {"ring": 0.3, "double-ring-1": 0.2, "mine": 0.25, "rfa-zigzag": 0.4})
    found = predict.predict(run)
    assert [one.scheme for one in found] == ["double-ring-1", "mine", "ring"]
    assert all(one.predicted_s > 0 for one in found)


@pytest.mark.parametrize(
    "slower",
    [
        {"inter": 40.0},
        {"cores": 1, "copy_gbyte_s": 0.05},
        {"pass_us": 20_000.0},
        {"attend_us": 5000.0},
        {"operation_us": 2000.0},
        {"late_us": 1e6, "copy_gbyte_s": 1.0},
        {"idle_late_us": 50_000.0},
        {"latency_us": 10_000.0},
        {"messages": [{"size": 1e5, "thread_us": 5000.0, "transport_us": 0.0}]},
        {"messages": [{"size": 1e5, "thread_us": 0.0, "transport_us": 50_000.0}]},
    ],
    ids=str,
)
def test_slower_links_and_processors_are_predicted_slower(tmp_path: Path, slower: dict[str, Any]) -> None:
    seconds = {"ring": 0.3, "double-ring-1": 0.2}
    fast = predict.predict(write_run(tmp_path, seconds))
    slow = predict.predict(write_run(tmp_path, seconds, **slower))
    assert all(b.predicted_s > 1.1 * a.predicted_s for a, b in zip(fast, slow, strict=True))


def test_another_runs_microbenchmarks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """For a run that was ended before its own, on the same machine."""
    for name in ("whole", "ended"):
        (tmp_path / name).mkdir()
    whole = write_run(tmp_path / "whole", {"ring": 0.3}, operation_us=2000.0)
    ended = write_run(tmp_path / "ended", {"ring": 0.3, "double-ring-1": 0.2})
    fast = predict.predict(ended)
    about = json.loads((ended / "run.json").read_text())
    del about["processors"]
    (ended / "run.json").write_text(json.dumps(about))
    slow = predict.predict(ended, whole)
    assert all(b.predicted_s > 1.1 * a.predicted_s for a, b in zip(fast, slow, strict=True))
    assert main([str(ended)]) == 2
    assert f"a whole run on that machine: {ended} has no cores, copy_gbyte_s" in capsys.readouterr().err


def made(*pairs: tuple[float, float]) -> list[Prediction]:
    return [Prediction(f"scheme {number}", *pair, volume=1.0) for number, pair in enumerate(pairs)]


def test_rank_correlation() -> None:
    assert rank_correlation(made((1, 5), (2, 6), (3, 7))) == 1.0
    assert rank_correlation(made((1, 7), (2, 6), (3, 5))) == -1.0
    assert rank_correlation(made((1, 1), (2, 3), (3, 2), (4, 4))) == pytest.approx(0.8)


def test_what_holds() -> None:
    right = made(*((1 + n / 10, 1 + n / 10) for n in range(10)))
    assert holds(right)
    assert not holds([replace(p, predicted_s=1.2 * p.measured_s) for p in right])  # median error
    assert not holds([replace(p, predicted_s=3 - p.measured_s) for p in right])  # order
    wrong_choice = made((1.0, 1.02), (1.06, 1.01), *((2 + n, 2 + n) for n in range(10)))
    assert rank_correlation(wrong_choice) > 0.9
    assert chosen_over_best(wrong_choice) == 1.06
    assert not holds(wrong_choice)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path, {"ring": 1e-6, "double-ring-1": 2.0})
    assert main([str(run), "--json", str(tmp_path / "found.json")]) == 1
    assert "2 schemes: rank correlation" in capsys.readouterr().out
    assert {row["scheme"] for row in json.loads((tmp_path / "found.json").read_text())[tmp_path.name]} == {
        "ring",
        "double-ring-1",
    }
    assert main([str(tmp_path / "nowhere")]) == 2
