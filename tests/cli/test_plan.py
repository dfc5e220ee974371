"""``wallfacer plan``: its output, its files and its errors."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from megatron_wallfacer.cli.main import main
from megatron_wallfacer.megatron.settings import settings_from
from megatron_wallfacer.planning.inventory import MOMENTS
from megatron_wallfacer.planning.search import TIE
from tests.megatron.test_arguments import Parse, parse  # noqa: F401
from tests.support import machine

SMALL = "plan --cluster h100-8x8 --nodes 2 --model llama3-8b --seq 128K".split()


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    code = main([*SMALL, *argv])
    said = capsys.readouterr()
    return code, said.out, said.err


def test_configurations_and_the_flags_of_the_first(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys)
    assert code == 0
    head, job, _, headings, *rows = out.splitlines()
    assert head.endswith("80 GB per rank; host memory: 2000 GB per node, 50 GB/s per device")
    assert job.startswith("llama3-8b, 131,072 tokens; predicted")
    assert re.split("  +", headings.strip())[-6:] == ["GB per rank", "peak", "host GB", "s", "MFU %", "of which s"]
    assert rows[0].split()[0] in "1248"
    assert re.search(r"^The first: --tensor-model-parallel-size \d .*--wallfacer-cp-size", out, re.MULTILINE)
    assert "Grids of attention" not in out


def test_grids_of_attention(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "--grids", "--tp", "1")
    assert code == 0
    assert "h100-8x8: 2 nodes x 8 devices" in out
    for name in ("ring", "double-ring", "usp", "wallfacer", "all-gather", "mesh"):
        assert re.search(rf"^{name} ", out, re.MULTILINE), name
    assert re.search(r"\d+ of \d+ grids and placements simulated.*; the first has the least traffic .* 2% .*: \d", out)


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
    small = ["plan", "--cluster", "h100-8x8", "--nodes", "1", "--seq", "64K", "--tp", "1", "--json"]
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
    limit = machine.time_limit(limit_s, time.process_time)
    argv = [sys.executable, "-m", "megatron_wallfacer.cli.main", "plan", "--nodes", str(nodes), "--seq", seq, "--json"]
    with (tmp_path / "out").open("w+") as out:
        _, status, used = os.wait4(subprocess.Popen(argv, stdout=out).pid, 0)
        assert status == 0
        out.seek(0)
        best = json.load(out)["best"][0]
    assert best["seconds"] < 1.2 * best["bound_s"]
    assert used.ru_utime + used.ru_stime < limit()
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
    assert flags["--seq-length"] == flags["--max-position-embeddings"] == 131072
    settings = settings_from(parse(*argv, world=16).args)
    assert str(settings.plan.grid) == best["grid"]
    assert list(settings.plan.grid.placement) == best["placement"]
    assert (settings.plan.forward, settings.plan.backward) == tuple(best["ring_variants"])
    assert settings.flags.keep_gathered_q == best["keep_gathered_q"]


def test_json_has_every_configuration_with_its_flags(capsys: pytest.CaptureFixture[str]) -> None:
    assert main("plan --nodes 1 --seq 1M --tp 1 --json --untested-optimizers".split()) == 0
    rows = json.loads(capsys.readouterr().out)["configurations"]
    assert len({str(row["flags"]) for row in rows}) == len(rows) > 4
    tiled = next(row for row in rows if row["costs_s"]["mlp_s"])
    assert tiled["flags"]["--wallfacer-mlp-tiles"] > 1
    on_host = next(row for row in rows if row["host_gb"] and row["recompute"] == "keep-attention")
    assert {"--wallfacer-keep-on-host", "--wallfacer-layer-inputs-on-host"} & on_host["flags"].keys()
    others = [row for row in rows if not row["has_plain_optimizer"]]
    assert all(row["flags"].get("--use-precision-aware-optimizer") for row in others)
    assert any(row["flags"].get("--optimizer-cpu-offload") and row["costs_s"]["adam_s"] > 0 for row in others)


def test_given_memory_is_in_place_of_the_devices(capsys: pytest.CaptureFixture[str]) -> None:
    assert main("plan --nodes 1 --seq 1M --tp 4 --memory 62".split()) == 0
    out = capsys.readouterr().out
    assert "; 62 GB per rank;" in out
    assert main("plan --nodes 1 --memory 0".split()) == 2
    assert "memory=0: must be a positive number of GB" in capsys.readouterr().err


def test_a_cluster_without_a_host_link_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main("plan --cluster a100-8x8-ethernet --nodes 1 --seq 128K --tp 4".split()) == 0
    assert "nothing is kept on the host: the cluster file has no host_link or" in capsys.readouterr().out


def test_what_does_not_fit_is_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, error = run(capsys, "--seq", "64M")
    assert code == 2
    for moment in MOMENTS:
        assert re.search(rf"^{moment} +\d+\.\d  layer inputs \d+", out, re.MULTILINE), moment
    assert len(re.findall("<- the peak", out)) == 1
    assert "count as fused kernels" in out
    assert re.search(r"leanest configuration needs \d+ GB per rank of 80 \(\w+\), \d+ GB of host", error)


def test_flags_that_are_not_in_use_are_named_with_what_they_remove(capsys: pytest.CaptureFixture[str]) -> None:
    assert main("plan --cluster h100-8x8 --nodes 1 --seq 1M --scheme auto".split()) == 0
    out = capsys.readouterr().out
    rows = dict(re.findall(r"^(--\S.*?) +([\d.]+) +[\d.]+$", out, re.MULTILINE))
    # Logits of 6 bytes per token and vocabulary entry are the peak.
    assert float(rows.pop("--wallfacer-loss-tiles 8")) > 70
    assert float(rows.pop("--wallfacer-keep-on-host 1")) == pytest.approx(30 * 1.09, abs=0.1)
    assert float(rows.pop("--wallfacer-layer-inputs-on-host 1")) == pytest.approx(30 * 1.074, abs=0.1)
    assert float(rows["--grad-reduce-in-bf16"]) == pytest.approx(16.06, abs=0.1)
    assert "--wallfacer-mlp-tiles" not in out


def test_the_longest_sequence(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "longest.yaml"
    assert main(f"plan --nodes 1 --tp 8 --max-seq --save {path}".split()) == 0
    out = capsys.readouterr().out
    tokens = int(re.search(r"^ *([\d,]+) +8 +one rank", out, re.MULTILINE)[1].replace(",", ""))
    assert yaml.safe_load(path.read_text())["MODEL_ARGS"]["--seq-length"] == tokens > 1_000_000
    assert re.search(rf"^{tokens:,} tokens: --tensor-model-parallel-size 8", out, re.MULTILINE)
    assert re.search(
        r"^65,536 tokens more: at least \d+\.\d GB per rank \(\w+: .*; \d+ of 2000 GB of host", out, re.MULTILINE
    )
    assert main("plan --nodes 1 --tp 8 --max-seq --json".split()) == 0
    first = json.loads(capsys.readouterr().out)[0]
    assert first["tokens"] == tokens
    assert "GB per rank" in first["stops"]


def test_no_sequence_fits(capsys: pytest.CaptureFixture[str]) -> None:
    argv = "plan --nodes 1 --gpus-per-node 1 --model llama3-70b --max-seq --untested-optimizers".split()
    assert main(argv) == 2
    said = capsys.readouterr()
    assert re.search(r"^head +\d+\.\d  gradient buffer 282.2; weights 141.1", said.out, re.MULTILINE)
    assert "nodes=1: must be more: for 2 tokens the leanest configuration needs 423 GB per rank of 80" in said.err


def test_trace_and_picture(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    trace, picture = tmp_path / "trace.json", tmp_path / "plans.png"
    assert run(capsys, "--trace", str(trace), "--plot", str(picture))[0] == 0
    events = json.loads(trace.read_text())
    events = events["traceEvents"] if isinstance(events, dict) else events
    assert {"X", "M"} <= {event["ph"] for event in events}
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--cluster nowhere", "cluster=nowhere: must be a file, or one of "),
        ("--model gpt-17", "model=gpt-17: must be one of gpt-3b"),
        ("--seq many", "seq=many: must be a number of tokens such as 65536, 128K or 1M"),
        ("--seq 1000 --tp 1", "seq=1000: must be a multiple of 32"),
        ("--tp 3", "tp=3: must be a divisor of the 8 devices of a node"),
        ("--cp 5", "cp=5: must be a divisor of 16"),
        ("--gpus-per-node 9", "gpus_per_node=9: must be from 1 to 8"),
        ("--seq 64M --json", "seq=67108864: must be shorter, or on more ranks: the leanest configuration needs "),
    ],
)
def test_impossible_requests_are_one_line(capsys: pytest.CaptureFixture[str], argv: str, message: str) -> None:
    code, _, error = run(capsys, *argv.split())
    assert code == 2
    assert message in error
    assert error.count("\n") == 1
