"""Cluster files: each shipped one loads, each error is one line."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_wallfacer.errors import OptionError, WallfacerError
from megatron_wallfacer.planning.cluster_file import load_cluster, preset_names

GOOD = """\
nodes: 2
gpus_per_node: 4
device: {tflops: 100, forward: 0.5}
intra: {gbyte_s: 100}
inter: {gbyte_s: null, latency_us: 0}
nics: 2
levels: [{nodes: 2, oversubscription: 1.5}]
"""


@pytest.mark.parametrize("name", preset_names())
def test_presets(name: str) -> None:
    cluster = load_cluster(name)
    assert cluster.name == name
    assert cluster.ranks > 1
    assert cluster.offers_host_memory == name.startswith(("h100", "h200"))
    assert cluster.device.kernels == ("h200" if name.startswith(("h100", "h200")) else None)


def test_a_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(GOOD)
    cluster = load_cluster(path, nodes=3)
    assert (cluster.name, cluster.nodes, cluster.levels[0].oversubscription) == ("mine", 3, 1.5)
    assert cluster.inter.gbyte_s is None


def test_messages_of_a_host(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(GOOD + HOST)
    host = load_cluster(path).host
    between = {0: 10, 1000: 10, 2000: 15, 3000: 20, 5000: 40, 9000: 80}
    assert {size: host.message(size).thread_us for size in between} == between
    assert host.message(2000).transport_us == 150
    assert replace(host, messages=host.messages[:1]).message(5000).thread_us == 10
    assert replace(host, messages=()).message(5000).thread_us == 0


def test_mistakes_in_messages(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    for wrong, said in {
        "thread_us: 20": "host.messages[2].thread_us: is missing",
        "size: 5000": "host.messages[1].size: is missing",
    }.items():
        path.write_text(GOOD + HOST.replace(f"{wrong}, ", ""))
        with pytest.raises(WallfacerError, match=re.escape(said)):
            load_cluster(path)
    path.write_text(GOOD + "host: {cores: 2, copy_gbyte_s: 1, messages: 3}\n")
    with pytest.raises(WallfacerError, match=re.escape("host.messages=3: must be a list of {size, thread_us, trans")):
        load_cluster(path)


HOST = """
host:
  cores: 2
  copy_gbyte_s: 1
  messages:
    - {size: 1000, thread_us: 10, transport_us: 100}
    - {size: 5000, thread_us: 40, transport_us: 400}
    - {size: 3000, thread_us: 20, transport_us: 200}
"""
WRONG = {
    "nodes: 2|nodes: 0": "nodes=0: must be a positive whole number",
    "nodes: 2|nodes: two": "nodes='two': must be a positive whole number",
    "nodes: 2|": "nodes: is missing",
    "nics: 2|nics: 3": "nics=3: must divide gpus_per_node 4, or be more",
    "nics: 2|cards: 2": "cards: is not an entry; use one of name, nodes",
    "tflops: 100|tflop: 100": "device.tflop: is not an entry; use one of tflops",
    "forward: 0.5|forward: 1.5": "device.forward=1.5: must be a part of the peak, at most 1",
    "tflops: 100|kernels: h300, tflops: 100": "device.kernels='h300': must be one of the measured kernels: h200",
    "tflops: 100|tflops: -1": "device.tflops=-1: must be a positive number",
    "{gbyte_s: 100}|100": "intra: must be a mapping, not int",
    "levels: [{nodes: 2, oversubscription: 1.5}]|levels: 3": "levels=3: must be a list",
    "oversubscription: 1.5|ratio: 1.5": "levels[0].ratio: is not an entry; use one of nodes",
    "nics: 2|transport: mpi": "transport=mpi: must be one of nccl, gloo",
    "nics: 2|host_link: fast": "host_link='fast': must be a positive number",
    "nics: 2|host_memory_gb: 0": "host_memory_gb=0: must be a positive number",
    "nodes: 2|nodes: [": "not YAML",
}


@pytest.mark.parametrize("change", WRONG)
def test_mistakes(tmp_path: Path, change: str) -> None:
    before, after = change.split("|", 1)
    path = tmp_path / "mine.yaml"
    path.write_text(GOOD.replace(before, after, 1))
    with pytest.raises(WallfacerError, match=re.escape(WRONG[change])) as error:
        load_cluster(path)
    assert "\n" not in str(error.value)
    assert "mine.yaml" in str(error.value)


def test_no_such_file() -> None:
    with pytest.raises(OptionError, match="cluster=nowhere: must be a file, or one of a100"):
        load_cluster("nowhere")
    with pytest.raises(OptionError, match="nodes=0: must be a positive number"):
        load_cluster("h100-8x8", nodes=0)
