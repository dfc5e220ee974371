"""``wallfacer tune`` under torchrun on CPU ranks, and its parts."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

from megatron_wallfacer.cli.main import main
from megatron_wallfacer.cli.tune import as_json
from megatron_wallfacer.errors import WallfacerError
from megatron_wallfacer.planning.choice import AttentionJob
from megatron_wallfacer.planning.cluster_file import load_cluster
from megatron_wallfacer.planning.search import named_choices
from megatron_wallfacer.schedule.volume import Shape
from megatron_wallfacer.tuning.cluster import count_nodes
from megatron_wallfacer.tuning.device_rates import _rate_and_call
from megatron_wallfacer.tuning.links import HOST_COPY, measure_host_memory

ROOT = Path(__file__).resolve().parents[2]


def test_on_four_ranks(tmp_path: Path) -> None:
    best, cluster = tmp_path / "best.yaml", tmp_path / "cluster.yaml"
    flags = "--model llama3-8b --heads-of 8 --seq 1024 --top 2 --repeats 1".split()
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4"),
            *("-m", "megatron_wallfacer.cli.main", "tune", *flags),
            *("--save", str(best), "--cluster-out", str(cluster)),
        ],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    rows = re.findall(r"^(\S*) +(\w+ .*?) {2,}([\d.]+) +([\d.]+)", done.stdout, re.MULTILINE)
    assert len(rows) >= 3
    assert "host_link: not measured, CPU ranks have no link to host memory" in done.stdout
    measured = [float(row[3]) for row in rows]
    assert measured == sorted(measured)
    assert "ring" in {row[0] for row in rows}
    flags = yaml.safe_load(best.read_text())["MODEL_ARGS"]
    assert flags["--wallfacer-cp-size"] == 4
    found = load_cluster(cluster)
    assert (found.nodes, found.gpus_per_node, found.transport) == (1, 4, "gloo")
    assert found.device.tflops > 0
    assert found.intra.gbyte_s > 0
    assert not found.offers_host_memory


def test_it_has_to_be_under_torchrun(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    assert main(["tune"]) == 2
    assert "tune: must run under torchrun: torchrun --nproc-per-node" in capsys.readouterr().err


def test_as_json(tmp_path: Path) -> None:
    cluster = load_cluster("h100-8x8")
    shape = Shape(tokens=1024, q_heads=8, kv_heads=8, head_dim=64)
    first, second = list(named_choices(AttentionJob(cluster, shape, 16), ("ring", "double-ring")))
    shown = json.loads(as_json(cluster, [(first, 1.5), (second, 2.5)]))
    (tmp_path / "cluster.yaml").write_text(yaml.safe_dump(shown["cluster"]))
    assert load_cluster(tmp_path / "cluster.yaml").intra == cluster.intra
    assert [(grid["name"], grid["measured_s"]) for grid in shown["grids"]] == [("ring", 1.5), ("double-ring", 2.5)]
    assert shown["grids"][0]["predicted_s"] == first.simulation.seconds


def test_the_slower_direction_of_the_host_link_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock that only copies move: 2 ms to the host, 4 ms from it."""
    now, copies = [0.0], []

    class Memory:
        def __init__(self, seconds: float) -> None:
            self.seconds = seconds

        def copy_(self, source: Memory, *, non_blocking: bool) -> None:
            copies.append((self.seconds, source.seconds))
            now[0] += self.seconds

    monkeypatch.setattr(torch, "empty", lambda *_, **kinds: Memory(0.002 if "pin_memory" in kinds else 0.004))
    monkeypatch.setattr(torch, "tensor", lambda value, **_: SimpleNamespace(item=lambda: value))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.distributed, "barrier", lambda: None)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda *_: None)
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    rate, size = measure_host_memory(torch.device("cuda"))
    assert rate == pytest.approx(HOST_COPY / 0.004 / 1e9)
    assert set(copies) == {(0.002, 0.004), (0.004, 0.002)}
    assert size > 1
    assert measure_host_memory(torch.device("cpu")) == (None, None)


def test_nodes_are_counted() -> None:
    assert count_nodes(["a", "a", "b", "b"]) == (2, 2)
    for hosts in (["a", "b", "a", "b"], ["a", "a", "b"]):
        with pytest.raises(WallfacerError, match="must be consecutive, and the same number on each node"):
            count_nodes(hosts)


def test_rate_and_call_fit_two_measurements() -> None:
    assert _rate_and_call((10.0, 3.0), (30.0, 5.0)) == (10.0, 2.0)
    assert _rate_and_call((10.0, 1.0), (40.0, 8.0)) == (
        5.0,
        0.0,
    )  # the small tile is faster: no call has a negative time
