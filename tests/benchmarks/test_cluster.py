"""Namespaces come, are limited, and go whatever happens."""

import csv
import json
import os
import signal
import stat
import tempfile
import time
from pathlib import Path

import pytest

from benchmarks.cluster.cluster import Cluster, existing, leftovers, network_of, processes_in, remove_leftovers
from benchmarks.cluster.tools import ClusterUnavailable, require_namespaces
from benchmarks.cluster.topology import Topology
from tests.benchmarks.support import SMOKE, needs_cluster, start, wait_for
from tests.support import machine

TOPOLOGY = Topology(nodes=2, ranks_per_node=2, inter_mbit=100, intra_mbit=1000)
RUN = (str(SMOKE), "--allow-busy", "--schemes", "ring")


def of(pid):
    """Namespaces that a process has made."""
    return [name for name in existing() if name.split("-")[1] == str(pid)]


@needs_cluster
@pytest.mark.parametrize("nic", ["rank", "node"])
def test_a_cluster_is_there_inside_the_block_and_gone_after_it(nic):
    with Cluster(Topology(2, 2, nic, 100, 1000)) as cluster:
        assert of(os.getpid()) == sorted(cluster.wiring.namespaces)
    assert of(os.getpid()) == []


@needs_cluster
def test_an_exception_cleans_up():
    with pytest.raises(ZeroDivisionError), Cluster(TOPOLOGY):
        raise ZeroDivisionError
    assert of(os.getpid()) == []


@needs_cluster
def test_a_cluster_that_cannot_be_finished_is_removed(monkeypatch):
    cluster = Cluster(TOPOLOGY)
    monkeypatch.setattr(type(cluster.wiring), "rank_limits", lambda self: ["qdisc add dev nowhere root tbf"])
    with pytest.raises(ValueError, match="tc failed"), cluster:
        pass
    assert of(os.getpid()) == []


@needs_cluster
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_cleans_up(number, code, tmp_path):
    run = start(*RUN, "--repeats", "100000", "--out", str(tmp_path))
    wait_for(run, "turn 1 ")
    assert of(run.pid)
    run.send_signal(number)
    run.communicate(timeout=20)
    assert run.returncode == code
    assert of(run.pid) == []


@needs_cluster
def test_a_rank_that_dies_ends_the_run_and_cleans_up(tmp_path):
    run = start(*RUN, "--repeats", "100000", "--out", str(tmp_path))
    wait_for(run, "turn 1 ")
    (rank,) = processes_in(f"wfbench-{run.pid}-r2")
    os.kill(rank, signal.SIGKILL)
    _, said = run.communicate(timeout=20)
    assert run.returncode == 1
    assert "rank " in said
    assert of(run.pid) == []


@needs_cluster
def test_what_a_killed_run_left_is_removed_by_the_next(tmp_path):
    run = start(*RUN, "--repeats", "100000", "--out", str(tmp_path))
    wait_for(run, "turn 1 ")
    ranks = [pid for name in of(run.pid) for pid in processes_in(name)]
    assert len(ranks) == 4
    run.kill()
    run.communicate()
    assert set(of(run.pid)) <= set(leftovers())
    with Cluster(TOPOLOGY):
        assert of(run.pid) == []
    assert list(Path(tempfile.gettempdir()).glob(f"wfbench-{run.pid}-*")) == []
    # The kernel killed the ranks with their parent: none is left in a namespace without a name.
    assert not any(network_of(pid) for pid in ranks)


@needs_cluster
def test_the_cluster_of_a_living_process_is_not_a_leftover():
    with Cluster(TOPOLOGY) as cluster:
        remove_leftovers()
        assert of(os.getpid()) == sorted(cluster.wiring.namespaces)


@needs_cluster
@pytest.mark.alone
def test_a_run_end_to_end_is_limited_counted_and_exact(tmp_path):
    limit = machine.time_limit(20)
    begin = time.monotonic()
    schemes = ("ring", "team-ring-2-in", "wallfacer-2-x", "all-gather")
    run = start(str(SMOKE), "--allow-busy", "--repeats", "1", "--out", str(tmp_path), "--schemes", *schemes)
    printed, said = run.communicate(timeout=60)
    assert run.returncode == 0, said
    about = json.loads((tmp_path / "run.json").read_text())
    assert about["goodput_mbit"]["inter"] == pytest.approx(200, rel=0.1)
    assert about["goodput_mbit"]["intra"] == pytest.approx(500, rel=0.1)
    found = about["processors"]
    assert 0 < found["cores"] < os.cpu_count()
    assert 0.1 < found["copy_gbyte_s"] < 1000
    in_us = {name: value for name, value in found.items() if name.endswith("_us")}
    in_us |= {
        f"{name} of {one['size']}": one[name] for one in found["messages"] for name in ("thread_us", "transport_us")
    }
    assert len(in_us) == 12
    assert all(0 < value < 10_000 for value in in_us.values()), in_us
    with (tmp_path / "summary.csv").open() as file:
        rows = {row["scheme"]: row for row in csv.DictReader(file)}
    assert set(rows) == set(schemes)
    for label, row in rows.items():
        for what in ("sent_mean", "inter_mean", "inter_max"):
            counted, planned = float(row[f"counted_{what}"]), float(row[f"planned_{what}"])
            # Headers and acknowledgements come on top, nothing else.
            assert planned <= counted <= 1.03 * planned, (label, what)
        assert float(row["median_s"]) > float(row["bound_s"]) > 0
        assert max(float(row[f"error_{name}"]) for name in ("out", "dq", "dk", "dv")) < 1e-5
        assert label in printed
    assert (tmp_path / "times.png").stat().st_size > 0
    assert of(run.pid) == []
    assert time.monotonic() - begin < limit()


def fake_tool(folder, name, script):
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR | stat.S_IXGRP | stat.S_IXOTH)


def problem(path):
    """What a run says that finds its tools there."""
    run = start(*RUN, PATH=str(path))
    _, said = run.communicate(timeout=60)
    assert run.returncode == 2
    assert said.startswith("benchmarks: error: ")
    assert said.count("\n") == 1
    return said


def test_without_tools_it_says_how_to_get_them(tmp_path):
    assert "apt-get install -y iproute2" in problem(tmp_path)


def test_without_the_right_it_says_so(tmp_path):
    fake_tool(tmp_path, "ip", "echo 'mount --make-shared /run/netns failed: Operation not permitted' >&2; exit 1")
    fake_tool(tmp_path, "tc", "exit 0")
    said = problem(tmp_path)
    assert "Operation not permitted" in said if os.geteuid() == 0 else "need root" in said


def test_without_root_it_says_so(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda tool: tool)
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    with pytest.raises(ClusterUnavailable) as caught:
        require_namespaces("wfbench-0-")
    assert str(caught.value) == "network namespaces need root with CAP_NET_ADMIN; this is uid 1000"
