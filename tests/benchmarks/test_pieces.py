"""The parts that need no cluster."""

import threading
import time

import pytest
import torch

pytest.importorskip("yaml", reason="settings are YAML: PyYAML, of the dev extra, is not installed")

from benchmarks.bound import counted_traffic, planned_traffic
from benchmarks.cluster.counters import LinkBytes, parse_net_dev
from benchmarks.cluster.quiet import CpuTime, parse_stat
from benchmarks.cluster.topology import Topology
from benchmarks.cluster.wiring import Wiring
from benchmarks.compute import SleepKernel, alone
from benchmarks.config import Compute, Shape
from benchmarks.dense import make_problem, relative_error
from benchmarks.ours import Ours
from megatron_wallfacer.kernels.protocol import AttnSpec
from megatron_wallfacer.kernels.reference import ReferenceKernel
from megatron_wallfacer.schedule import volume
from megatron_wallfacer.schedule.attn_tile import AttnTile

VOLUME = volume.Shape(tokens=8, q_heads=2, kv_heads=2, head_dim=4, itemsize=4)


def sleep_inputs(rows=64, cols=64):
    return torch.zeros(rows, 1, 2, 16), torch.zeros(cols, 1, 2, 16), torch.zeros(cols, 1, 2, 16)


def tile(q, k, scale=1.0, *, causal=False):
    return AttnTile((0, len(q)), (0, len(k)), causal), AttnSpec(scale)


@pytest.mark.parametrize(("causal", "share"), [(False, 1.0), (True, 0.5)])
def test_a_modelled_kernel_takes_its_time_and_no_processor(causal, share):
    q, k, v = sleep_inputs()
    kernel = SleepKernel(gflops=4 * 2 * 16 * 64 * 64 / 0.1 / 1e9)
    begin, cpu = time.monotonic(), time.process_time()
    out, lse = kernel.forward(q, k, v, *tile(q, k, causal=causal))
    # Never early. How late is up to the machine's other load.
    assert time.monotonic() - begin >= 0.1 * share
    assert time.process_time() - cpu < 0.05
    assert (out.shape, lse.shape, lse.dtype) == (q.shape, q.shape[:3], torch.float32)


def test_a_modelled_backward_is_two_and_a_half_forwards():
    q, k, v = sleep_inputs(rows=64, cols=32)
    kernel = SleepKernel(gflops=4 * 2 * 16 * 64 * 32 / 0.02 / 1e9)
    out, lse = kernel.forward(q, k, v, *tile(q, k))
    begin = time.monotonic()
    grads = kernel.backward(out, q, k, v, out, lse, *tile(q, k))
    assert time.monotonic() - begin >= 0.05
    assert [grad.shape for grad in grads] == [q.shape, k.shape, v.shape]


@pytest.mark.alone
def test_a_modelled_kernel_lets_other_threads_run():
    q, k, v = sleep_inputs()
    kernel = SleepKernel(gflops=4 * 2 * 16 * 64 * 64 / 0.2 / 1e9)
    other = threading.Thread(target=kernel.forward, args=(q, k, v, *tile(q, k)))
    other.start()
    begin = time.monotonic()
    sum(range(1000))
    assert time.monotonic() - begin < 0.1
    assert other.is_alive()
    other.join()


def test_compute_alone_is_the_work_over_the_rate():
    shape = Shape(tokens=8192, heads=8, kv_heads=8, head_dim=64)
    assert alone(Compute("sleep", 10.6), shape, 16).rank_s == pytest.approx(1.418, abs=1e-3)


def test_dense_attention_agrees_with_the_reference_kernel():
    problem = make_problem(tokens=32, heads=4, kv_heads=2, head_dim=8)
    q, k, v, dout = (problem.inputs[name].transpose(0, 1) for name in ("q", "k", "v", "dout"))
    kernel = ReferenceKernel()
    out, lse = kernel.forward(q, k, v, *tile(q, k, 8**-0.5, causal=True))
    found = out, *kernel.backward(dout, q, k, v, out, lse, *tile(q, k, 8**-0.5, causal=True))
    for name, tensor in zip(("out", "dq", "dk", "dv"), found, strict=True):
        assert relative_error(tensor.transpose(0, 1), problem.answers[name]) < 1e-12


def test_counters_are_read_from_the_kernels_table():
    text = (
        "Inter-|   Receive                    |  Transmit\n"
        " face |bytes packets errs            |bytes packets\n"
        "    lo:     1 1 0 0 0 0 0 0     2 1 0 0 0 0 0 0\n"
        "   nic:   300 3 0 0 0 0 0 0   400 4 0 0 0 0 0 0\n"
    )
    assert parse_net_dev(text) == {"lo": (1, 2), "nic": (300, 400)}


def test_processor_time_is_read_from_its_first_line():
    assert parse_stat("cpu  100 20 30 999 0 4 6 5 0 0\ncpu0 1 1 1", 100) == CpuTime(1.5, pytest.approx(0.1), 0.05)


def test_other_peoples_processor_time_disturbs():
    assert not CpuTime(1.0, 0.0, 0.0).disturbed(own_s=1.0)
    assert CpuTime(1.3, 0.0, 0.0).disturbed(own_s=1.0)
    assert CpuTime(1.0, 0.0, 0.3).disturbed(own_s=1.0)


def test_a_ring_is_bound_by_the_card_of_the_last_rank_of_a_node():
    topology = Topology(nodes=2, ranks_per_node=2, nic="rank", inter_mbit=8, intra_mbit=80)
    traffic = planned_traffic(Ours("ring", 4, (2, 2), {"scheme": "ring"}), topology, VOLUME)
    shard = 8 * 2 * 4 * 4
    # K, V three times forward and three times backward, dK, dV three times.
    assert set(traffic.sent) == {2 * shard * 9}
    assert traffic.inter_sent == (0, 2 * shard * 9, 0, 2 * shard * 9)
    assert traffic.link_s == pytest.approx(2 * shard * 9 / 1e6)


def test_ranks_that_share_a_card_add_up():
    topology = Topology(nodes=2, ranks_per_node=2, nic="node", inter_mbit=8, intra_mbit=None)
    counted = [LinkBytes(inter_sent=100, inter_received=50, intra_sent=10) for _ in range(4)]
    traffic = counted_traffic(counted, topology)
    assert traffic.link_s == pytest.approx(200 / 1e6)
    assert (traffic.sent[0], traffic.inter_sent[0]) == (110, 100)


@pytest.mark.parametrize("nic", ["rank", "node"])
def test_every_link_is_limited_at_both_ends(nic):
    wiring = Wiring(Topology(2, 2, nic, inter_mbit=100, intra_mbit=1000), "t-")
    cards = [line for line in wiring.switch_limits() if "rate 100000000bit" in line]
    links = [line for line in wiring.switch_limits() if "rate 1000000000bit" in line]
    assert len(links) == 4
    # One card a rank is limited at its rank and at the fabric; one a node at both ends of the link between bridges.
    assert len(cards) == 4
    assert len(wiring.rank_limits()) == (2 if nic == "rank" else 1)


def test_an_unlimited_link_has_no_bucket():
    wiring = Wiring(Topology(2, 2, "rank", inter_mbit=None, intra_mbit=None), "t-")
    assert wiring.switch_limits() == wiring.rank_limits() == []


def test_addresses_differ_beyond_one_byte():
    wiring = Wiring(Topology(2, 200), "t-")
    assert len({wiring.address(rank) for rank in range(400)}) == 400
