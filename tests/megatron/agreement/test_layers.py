"""Layers of ranks in, lines out: no false alarm with pipeline stages, and a changed value is found on a late stage."""

from __future__ import annotations

import json

import pytest
from torch import nn

from megatron_wallfacer.engine.agreement.compare import Verdict
from megatron_wallfacer.engine.failures import pass_name
from megatron_wallfacer.engine.waits.explain import State
from megatron_wallfacer.megatron.agreement.layers import HeldLayers, compare_layers, layers_of, name_mtp_layers
from megatron_wallfacer.megatron.keep import Keeper
from tests.megatron.test_core_attention import build

PLAIN = {"mask": "causal", "window": "none", "scale": "0.25", "sinks": "none", "kernel": "reference", "plan": "ring"}
WINDOW = PLAIN | {"window": "100,0", "plan": "mesh"}


def held(*layers: int, mtp: bool = False, left: tuple[int, ...] = ()) -> dict[str, dict[str, str]]:
    """Layers as one rank holds them: every second one has a window, some are Megatron's own."""
    found = {f"layer {number}": dict(WINDOW if number % 2 else PLAIN) for number in layers}
    found |= {f"layer {number}": {"attention": "TEDotProductAttention"} for number in left}
    return found | ({"MTP depth 1, layer 1": dict(PLAIN)} if mtp else {})


def job() -> dict[int, HeldLayers]:
    """CP 2 x PP 2 x DP 1, two virtual stages each, MTP on the last stage, layer 2 left to Megatron."""
    stages = held(1, 5, 6, left=(2,)), held(3, 4, 7, 8, mtp=True)
    return {rank: HeldLayers((rank // 2 * 2, rank // 2 * 2 + 1), stages[rank // 2]) for rank in range(4)}


def test_stages_windows_mtp_and_layers_left_to_megatron_agree() -> None:
    assert compare_layers(job()) == Verdict()
    # Its own set on each stage, also where replicas hold the same layers.
    replicas = job() | {rank + 4: HeldLayers((4, 5), job()[0].layers) for rank in range(2)}
    assert compare_layers(replicas) == Verdict()


@pytest.mark.parametrize(
    ("layer", "name", "value"),
    [
        ("layer 7", "window", "200,0"),
        ("layer 8", "mask", "full"),
        ("layer 8", "scale", "0.5"),
        ("layer 4", "kernel", "cpu"),
        ("MTP depth 1, layer 1", "sinks", "learnable"),
    ],
)
def test_a_changed_value_on_the_last_stage_is_found(layer: str, name: str, value: str) -> None:
    records = job()
    changed = {key: dict(values) for key, values in records[3].layers.items()}
    before = changed[layer][name]
    changed[layer][name] = value
    records[3] = HeldLayers((2, 3), changed)
    assert compare_layers(records).errors == (f"{layer}: rank 3 has {name} {value}, rank 2 has {before}",)


def test_replicas_must_hold_the_same_layer() -> None:
    """Ranks of different context-parallel groups train copies of it."""
    records = {rank: HeldLayers((rank // 2 * 2, rank // 2 * 2 + 1), held(1)) for rank in range(4)}
    records[2] = HeldLayers((2, 3), {"layer 1": PLAIN})
    records[3] = records[2]
    assert compare_layers(records).errors[0] == "layer 1: ranks 2, 3 have window none, ranks 0, 1 have 100,0"


def test_a_group_holds_one_set() -> None:
    records = job()
    records[1] = HeldLayers((0, 1), held(1, 5, left=(2,)))
    line = "context-parallel group of ranks 0, 1: rank 1 has no layer 6, rank 0 has it"
    assert compare_layers(records).errors == (line,)
    records = job()
    records[1] = HeldLayers((0, 1), held(1, 2, 5, 6))
    errors = compare_layers(records).errors
    assert any(line.startswith("layer 2: ") and "TEDotProductAttention" in line for line in errors)


def test_layers_of_multi_token_prediction_have_names() -> None:
    """Both kinds have the same numbers."""
    decoder, mtp = build(verify_every=1), build(verify_every=1)
    mtp.keeper = Keeper("layer 3")
    model = nn.ModuleDict({"decoder": nn.ModuleList([decoder])})
    model["mtp"] = nn.ModuleDict({"layers": nn.ModuleList([nn.Module(), nn.ModuleDict({"core_attention": mtp})])})
    name_mtp_layers([model])
    assert pass_name("backward", decoder._call.layer) == "backward pass of layer 3"
    for call in (mtp._call, mtp._unseen, mtp._verified):
        assert pass_name("backward", call.layer) == "backward pass of MTP depth 2"
    assert mtp._verified.verify
    assert mtp.keeper._where == "MTP depth 2"
    state = State(3, "n1", passes=1, layer=mtp._call.layer, backward=True)
    assert State.from_text(state.to_text()).where == "MTP depth 2 backward"
    assert list(layers_of([model])) == ["layer 3", "MTP depth 2, layer 3"]


def test_records_from_texts_agree() -> None:
    """Ranks exchange texts, in which tuples become lists."""
    read = {rank: HeldLayers(*json.loads(json.dumps(record))) for rank, record in job().items()}
    assert read[3].layers == job()[3].layers
    assert compare_layers(read) == Verdict()
