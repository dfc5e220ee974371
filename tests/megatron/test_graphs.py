"""``--wallfacer-cuda-graphs`` in Megatron: where it is an error, what it reaches, what is said of it."""

from __future__ import annotations

import re
from argparse import Namespace
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from megatron_wallfacer.engine import graphed
from megatron_wallfacer.engine.groups import AxisGroups
from megatron_wallfacer.engine.ranges import Ranges
from megatron_wallfacer.engine.timeline import nothing
from megatron_wallfacer.errors import WallfacerError
from megatron_wallfacer.megatron import graphs
from megatron_wallfacer.megatron import session as session_module
from megatron_wallfacer.megatron.arguments import Settings
from megatron_wallfacer.megatron.banner import _cost_rows
from megatron_wallfacer.megatron.core_attention import core_attention_class
from megatron_wallfacer.megatron.session import Session
from megatron_wallfacer.schedule.grid import Grid
from megatron_wallfacer.schedule.schemes import make_plan
from megatron_wallfacer.schedule.volume import Shape
from tests.engine.tape import TapeCapture
from tests.megatron.test_core_attention import CAUSAL, LoneSession, config

GROWING = "expandable_segments:True"

NODES = {"one": ("a",) * 4, "two": ("a", "a", "b", "b")}


@pytest.mark.parametrize(
    ("backend", "nodes", "nccl", "variables", "refused"),
    [
        ("nccl", "one", (2, 28, 9), {}, ""),
        ("nccl", "two", (2, 30, 4), {}, ""),
        ("nccl", "two", None, {}, ""),
        ("nccl", "two", (2, 28, 9), {}, "NCCL 2.28.9: must be 2.30.4 or later with --wallfacer-cuda-graphs on several"),
        ("gloo", "one", None, {}, "--wallfacer-cuda-graphs: must be left out where the backend is gloo"),
        ("nccl", "one", None, {"TORCH_NCCL_BLOCKING_WAIT": "0"}, ""),
        ("nccl", "one", None, {"TORCH_NCCL_BLOCKING_WAIT": "1"}, "TORCH_NCCL_BLOCKING_WAIT=1: must be unset or 0"),
        ("nccl", "one", None, {"PYTORCH_CUDA_ALLOC_CONF": GROWING}, f"PYTORCH_CUDA_ALLOC_CONF={GROWING}: needs NCCL_"),
        ("nccl", "one", None, {"PYTORCH_CUDA_ALLOC_CONF": GROWING, "NCCL_GRAPH_REGISTER": "0"}, ""),
    ],
)
def test_where_messages_cannot_be_in_a_graph(
    monkeypatch: pytest.MonkeyPatch, backend: str, nodes: str, nccl: object, variables: dict[str, str], refused: str
) -> None:
    monkeypatch.setattr(graphs, "loaded_nccl", lambda: nccl)
    groups = AxisGroups(Grid(ring_outer=4), 0, (0, 1, 2, 3), NODES[nodes], {}, backend)
    if not refused:
        return graphs.check_graphs(groups, variables)
    with pytest.raises(WallfacerError, match=f"^{re.escape(refused)}"):
        graphs.check_graphs(groups, variables)
    return None


def lone(cls: type[Session] = LoneSession, **more: object) -> Session:
    """A session with the flag, on one rank."""
    settings = Settings(make_plan("ring", 1), "auto", False, cuda_graphs=True)
    args = Namespace(distributed_timeout_minutes=1, **more)
    return cls((0, 19, 2), torch.device("cpu"), args=args, settings=settings)


def test_groups_are_checked_when_they_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    made = SimpleNamespace(groups=AxisGroups(Grid(), 0, (0,), ("a",), {}, "gloo"))
    monkeypatch.setattr(session_module, "connected", lambda *args, **options: made)
    monkeypatch.setattr(dist, "get_process_group_ranks", lambda group: [0])
    with pytest.raises(WallfacerError, match="must be left out where the backend is gloo"):
        lone(Session).connect(object())


def test_the_flag_reaches_the_passes_of_a_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    capture = TapeCapture()
    monkeypatch.setattr(graphed, "CudaCapture", lambda: capture)
    layer = core_attention_class(lone())(config(), 1, CAUSAL, "self", pg_collection=SimpleNamespace(cp="group"))
    tensors = [torch.randn(4, 1, 2, 8, dtype=torch.float64) for _ in range(3)]
    trained = [layer(*tensors, None) for _ in range(3)]
    evaluated = layer.eval()(*tensors, None)
    assert [tape.replays for tape in capture.tapes] == [2]
    assert all(torch.equal(out, trained[0]) for out in (*trained, evaluated))


def test_a_profile_shows_graphs() -> None:
    session = lone(profile=True)
    assert session.recorder() is nothing
    without = lone(profile=True)
    without.settings = Settings(make_plan("ring", 1), "auto", False)
    assert isinstance(without.recorder(), Ranges)


def test_the_start_block_has_what_graphs_hold() -> None:
    plan, shape = make_plan("ring", 2), Shape(tokens=2048, q_heads=32, kv_heads=8, head_dim=128)
    assert "cuda graphs" not in _cost_rows(plan, shape, q_kept=False)
    row = _cost_rows(plan, shape, q_kept=False, graphs=True)["cuda graphs"]
    assert re.fullmatch(r"one of each pass for all layers; the two hold [\d.]+ MiB", row)
