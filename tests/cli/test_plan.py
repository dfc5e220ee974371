"""``wallfacer plan``: what it prints and writes, and what it refuses."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import yaml

from megatron_wallfacer.cli import scaling
from megatron_wallfacer.cli.main import main
from megatron_wallfacer.megatron.arguments import settings_from
from megatron_wallfacer.planning.load import load_cluster
from megatron_wallfacer.planning.search import TIE
from tests.megatron.test_arguments import Parse, parse  # noqa: F401

SMALL = "plan --cluster h100-8x8 --nodes 2 --model llama3-8b --seq 128K".split()


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    code = main([*SMALL, *argv])
    said = capsys.readouterr()
    return code, said.out, said.err


def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys)
    assert code == 0
    assert "h100-8x8: 2 nodes x 8 devices" in out
    for name in ("ring", "double-ring", "usp", "wallfacer", "all-gather", "mesh"):
        assert re.search(rf"^{name} ", out, re.MULTILINE), name
    assert re.search(r"\d+ of \d+ grids and placements played; the first moves the fewest words .* 2% .*: \d", out)


def test_the_best_comes_first_and_each_grid_once(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = run(capsys, "--json")
    found = json.loads(out)
    first, *others = [row["seconds"] for row in found["best"]]
    assert others == sorted(others)
    assert first <= TIE * others[0]
    grids = [row["grid"] for row in found["best"]]
    assert len(set(grids)) == len(grids)
    assert all(row["seconds"] >= row["bound_s"] for row in found["best"] + found["named"])


def test_graphs_hold_more(capsys: pytest.CaptureFixture[str]) -> None:
    small = ["plan", "--cluster", "h100-8x8", "--nodes", "1", "--seq", "64K", "--json"]
    held = []
    for flags in ([], ["--cuda-graphs"]):
        assert main([*small, *flags]) == 0
        rows = json.loads(capsys.readouterr().out)["named"]
        held.append({row["name"]: row["buffers_gb"] for row in rows})
    eager, graphed = held
    assert all(graphed[name] > eager[name] for name in eager)


@pytest.mark.alone
@pytest.mark.parametrize(("nodes", "seq", "limit_s"), [(128, "1M", 5.0), (8192, "64M", 30.0)])
def test_large_clusters_take_seconds_and_little_memory(tmp_path: Path, nodes: int, seq: str, limit_s: float) -> None:
    """The whole command, start included. Processor time: the machine may have other things to do."""
    argv = [sys.executable, "-m", "megatron_wallfacer.cli.main", "plan", "--nodes", str(nodes), "--seq", seq, "--json"]
    with (tmp_path / "out").open("w+") as out:
        _, status, used = os.wait4(subprocess.Popen(argv, stdout=out).pid, 0)
        assert status == 0
        out.seek(0)
        best = json.load(out)["best"][0]
    assert best["seconds"] < 1.2 * best["bound_s"]
    assert used.ru_utime + used.ru_stime < limit_s
    assert used.ru_maxrss * 1024 < 2e9


def test_what_it_saves_is_what_megatron_parses(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    parse: Parse,  # noqa: F811
) -> None:
    path = tmp_path / "best.yaml"
    _, out, _ = run(capsys, "--json", "--save", str(path))
    best = json.loads(out)["best"][0]
    flags = yaml.safe_load(path.read_text())["MODEL_ARGS"]
    argv = [word for flag, value in flags.items() for word in ([flag] if value is True else [flag, str(value)])]
    lengths = ("--seq-length", "131072", "--max-position-embeddings", "131072")
    settings = settings_from(parse(*argv, *lengths, world=16).args)
    assert str(settings.plan.grid) == best["grid"]
    assert list(settings.plan.grid.placement) == best["placement"]
    assert (settings.plan.forward, settings.plan.backward) == tuple(best["riders"])
    assert settings.keep_gathered_q == best["q_kept"]


def test_trace_and_picture(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    trace, picture = tmp_path / "trace.json", tmp_path / "plans.png"
    assert run(capsys, "--trace", str(trace), "--plot", str(picture))[0] == 0
    events = json.loads(trace.read_text())
    events = events["traceEvents"] if isinstance(events, dict) else events
    assert {"X", "M"} <= {event["ph"] for event in events}
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_scaling(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "points", partial(scaling.points, devices=(16, 32)))
    picture = tmp_path / "scaling.png"
    assert run(capsys, "--scaling", str(picture))[0] == 0
    found = list(scaling.points(load_cluster("h100-8x8")))
    assert [(one.line, one.devices) for one in found] == [("MHA", 16), ("GQA 8", 16), ("MHA", 32), ("GQA 8", 32)]
    assert all(one.seconds >= one.kernel_s > 0 for one in found)
    assert found[2].kernel_s > 1.9 * found[0].kernel_s  # as many tokens a device, twice as many keys
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--cluster nowhere", "cluster=nowhere: must be a file, or one of "),
        ("--model gpt-17", "model=gpt-17: must be one of gpt-3b"),
        ("--seq many", "seq=many: must be a number of tokens such as 65536, 128K or 1M"),
        ("--seq 1000", "seq=1000: must be a multiple of 32"),
        ("--tp 3", "tp=3: must be a divisor of the 8 devices of a node"),
        ("--cp 5", "cp=5: must be a divisor of 16"),
        ("--seq 64M", "seq=67108864: must be shorter, or on more ranks: without attention's buffers a rank needs "),
    ],
)
def test_impossible_requests_are_one_line(capsys: pytest.CaptureFixture[str], argv: str, message: str) -> None:
    code, _, error = run(capsys, *argv.split())
    assert code == 2
    assert message in error
    assert error.count("\n") == 1
