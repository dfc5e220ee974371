"""``--wallfacer-cuda-graphs`` in Megatron: where it is an error, what it reaches, what is said of it."""

from __future__ import annotations

import re
import sys
from argparse import Namespace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from megatron_wallfacer.engine import graphed
from megatron_wallfacer.engine.foreign import ForeignCaptures
from megatron_wallfacer.engine.groups import AxisGroups
from megatron_wallfacer.engine.ranges import Ranges
from megatron_wallfacer.engine.timeline import no_observer
from megatron_wallfacer.errors import WallfacerError
from megatron_wallfacer.megatron import graphs, plugin_state
from megatron_wallfacer.megatron.core_attention import core_attention_class
from megatron_wallfacer.megatron.flags import Flags
from megatron_wallfacer.megatron.megatron_graphs import free_graphs
from megatron_wallfacer.megatron.plugin_state import PluginState
from megatron_wallfacer.megatron.settings import Settings
from megatron_wallfacer.megatron.startup_report import _cost_rows, _megatron_graphs
from megatron_wallfacer.schedule.grid import Grid
from megatron_wallfacer.schedule.schemes import make_plan
from megatron_wallfacer.schedule.volume import Shape
from tests.engine.tape import TapeCapture
from tests.megatron.test_core_attention import CAUSAL, LoneState, config

INSIDE = "--cuda-graph-impl local"
GROWING = "expandable_segments:True"

NODES = {"one": ("a",) * 4, "two": ("a", "a", "b", "b")}


@pytest.mark.parametrize(
    ("backend", "nodes", "nccl", "variables", "rejected"),
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
    monkeypatch: pytest.MonkeyPatch, backend: str, nodes: str, nccl: object, variables: dict[str, str], rejected: str
) -> None:
    monkeypatch.setattr(graphs, "loaded_nccl", lambda: nccl)
    groups = AxisGroups(Grid(ring_outer=4), 0, (0, 1, 2, 3), NODES[nodes], {}, backend)
    if not rejected:
        return graphs.check_graphs(groups, variables)
    with pytest.raises(WallfacerError, match=f"^{re.escape(rejected)}"):
        graphs.check_graphs(groups, variables)
    return None


def test_the_message_names_the_flag_that_puts_messages_into_graphs() -> None:
    groups = AxisGroups(Grid(ring_outer=4), 0, (0, 1, 2, 3), NODES["one"], {}, "gloo")
    with pytest.raises(WallfacerError, match=f"^{INSIDE}: must be left out where the backend is gloo"):
        graphs.check_graphs(groups, {}, INSIDE)


def lone(cls: type[PluginState] = LoneState, inside: str | None = None, **more: object) -> PluginState:
    """A state on one rank with the flag, or with Megatron's graphs around attention."""
    settings = Settings(make_plan("ring", 1), Flags(cuda_graphs=inside is None), megatron_graphs=inside)
    args = Namespace(distributed_timeout_minutes=1, **more)
    return cls((0, 19, 2), torch.device("cpu"), args=args, settings=settings)


def test_groups_are_checked_when_they_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    made = SimpleNamespace(groups=AxisGroups(Grid(), 0, (0,), ("a",), {}, "gloo"))
    monkeypatch.setattr(plugin_state, "connected", lambda *args, **options: made)
    monkeypatch.setattr(dist, "get_process_group_ranks", lambda group: [0])
    for inside in (None, INSIDE):
        with pytest.raises(WallfacerError, match=f"^{inside or graphs.FLAG}: must be left out where the backend is gl"):
            lone(PluginState, inside).connect(object())


def test_the_flag_reaches_the_passes_of_a_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    capture = TapeCapture()
    monkeypatch.setattr(graphed, "CudaCapture", lambda: capture)
    layer = core_attention_class(lone())(config(), 1, CAUSAL, "self", pg_collection=SimpleNamespace(cp="group"))
    tensors = [torch.randn(4, 1, 2, 8, dtype=torch.float64) for _ in range(3)]
    trained = [layer(*tensors, None) for _ in range(3)]
    evaluated = layer.eval()(*tensors, None)
    assert [tape.replays for tape in capture.tapes] == [2]
    assert all(torch.equal(out, trained[0]) for out in (*trained, evaluated))


def test_a_layer_inside_megatrons_graphs() -> None:
    layer = core_attention_class(lone(inside=INSIDE))(
        config(), 1, CAUSAL, "self", pg_collection=SimpleNamespace(cp="g")
    )
    assert isinstance(layer._call.runtime.graphs, ForeignCaptures)
    assert layer._call.run == layer._unseen.run == layer._call.runtime.graphs.run


def test_graphs_that_a_script_sets_in_code_are_rejected() -> None:
    layer = core_attention_class(lone())
    with pytest.raises(WallfacerError, match=r"^layer 3: --cuda-graph-impl local: must be on the command line"):
        layer(config(cuda_graph_impl="local"), 3, CAUSAL, "self", pg_collection=SimpleNamespace(cp="group"))


def test_graphs_of_megatron_are_freed_before_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Megatron has no list of its runners once their graphs are made; NCCL waits for graphs with its messages."""

    class Runner:
        pass

    # Imported it takes ten seconds; its source has the names.
    name = "megatron.core.transformer.cuda_graphs"
    source = (Path(find_spec("megatron.core").origin).parent / "transformer" / "cuda_graphs.py").read_text()
    assert all(text in source for text in ("class _CudaGraphRunner(", "self.fwd_graph = ", "self.bwd_graph = "))
    monkeypatch.setitem(sys.modules, name, SimpleNamespace(_CudaGraphRunner=Runner))
    reset: list[str] = []
    runner = Runner()
    runner.fwd_graph, runner.bwd_graph = (SimpleNamespace(reset=lambda name=name: reset.append(name)) for name in "fb")
    for _ in range(2):
        free_graphs()
        assert reset == ["f", "b"]
        assert runner.fwd_graph is runner.bwd_graph is None
    monkeypatch.delitem(sys.modules, name)
    free_graphs()


def test_a_profile_shows_graphs() -> None:
    state = lone(profile=True)
    assert state.observer is no_observer
    without = lone(profile=True)
    without.turn_on(Settings(make_plan("ring", 1)), None)
    assert isinstance(without.observer, Ranges)


def test_the_start_block_has_what_graphs_hold() -> None:
    plan, shape = make_plan("ring", 2), Shape(tokens=2048, q_heads=32, kv_heads=8, head_dim=128)
    assert "cuda graphs" not in _cost_rows(plan, shape, keep_gathered_q=False)
    row = _cost_rows(plan, shape, keep_gathered_q=False, graphs=True)["cuda graphs"]
    assert re.fullmatch(r"The CUDA graphs of both passes hold [\d.]+ MiB\.", row)


def test_the_startup_report_has_megatrons_graphs_that_hold_attention() -> None:
    text = _megatron_graphs(lone(inside=INSIDE).settings)
    assert text == f"CUDA graphs of Megatron ({INSIDE}) hold attention. Their memory pool holds its buffers."
    assert _megatron_graphs(lone().settings) is None
