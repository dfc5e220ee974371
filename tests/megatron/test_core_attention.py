"""The module rejects what it cannot do, also where a script sets it in code and no flag was checked."""

from __future__ import annotations

from argparse import Namespace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_wallfacer.engine.pass_cache import PassCache
from megatron_wallfacer.errors import WallfacerError
from megatron_wallfacer.megatron.core_attention import WallfacerCoreAttention, core_attention_class
from megatron_wallfacer.megatron.flags import Flags
from megatron_wallfacer.megatron.layer_selection import LayerSelection, is_megatrons
from megatron_wallfacer.megatron.plugin_state import PluginState
from megatron_wallfacer.megatron.settings import Settings
from megatron_wallfacer.schedule.grid import Grid
from megatron_wallfacer.schedule.mask import Mask
from megatron_wallfacer.schedule.schemes import make_plan

CAUSAL, PADDING = SimpleNamespace(name="causal"), SimpleNamespace(name="padding")


class LoneState(PluginState):
    """A state of one rank, without process groups."""

    def transfers(self, group: object, grid: Grid) -> Any:
        from megatron_wallfacer.engine.groups import connect
        from megatron_wallfacer.engine.transfers import Transfers

        return Transfers(connect(None, grid))


def config(**changes: object) -> SimpleNamespace:
    plain = {"kv_channels": 8, "params_dtype": torch.float64, "attention_dropout": 0.0, "window_size": None}
    plain |= {"softmax_type": "vanilla", "num_attention_heads": 2, "num_query_groups": 2}
    plain |= {"perform_initialization": True, "init_method": torch.nn.init.ones_}
    return SimpleNamespace(**(plain | {"tensor_model_parallel_size": 1} | changes))


def build(*, attn_mask_type: Any = CAUSAL, attention_type: str = "self", **changes: Any) -> WallfacerCoreAttention:
    settings = Settings(make_plan("ring", 1), Flags(verify_every=changes.pop("verify_every", None)))
    state = LoneState((0, 19, 2), torch.device("cpu"), args=Namespace(), settings=settings)
    names = ("attention_dropout", "k_channels", "v_channels", "num_splits", "softmax_scale")
    keywords = {name: changes.pop(name) for name in names if name in changes}
    return core_attention_class(state)(
        config=changes.pop("config", config()),
        layer_number=3,
        attn_mask_type=attn_mask_type,
        attention_type=attention_type,
        pg_collection=SimpleNamespace(cp="group"),
        **keywords,
    )


class Theirs(torch.nn.Module):
    """Megatron's own attention."""

    def __init__(self, config: Any, layer_number: int, **keywords: Any) -> None:
        super().__init__()
        self.layer_number, self.keywords = layer_number, keywords


@pytest.mark.parametrize(
    ("selection", "window", "ours"),
    [
        (None, None, [1, 2, 3, 4]),
        (LayerSelection("1,3-4", frozenset({1, 3, 4})), None, [1, 3, 4]),
        # Every second layer has no window.
        (LayerSelection("full", None), (4, 0), [2, 4]),
        (LayerSelection("window", None), (4, 0), [1, 3]),
    ],
)
def test_other_layers_keep_megatrons_attention(
    selection: LayerSelection | None, window: object, ours: list[int]
) -> None:
    settings = Settings(make_plan("ring", 1), layers=selection)
    state = LoneState((0, 19, 2), torch.device("cpu"), args=Namespace(), settings=settings)
    kind, of = core_attention_class(state, theirs=Theirs), config(window_size=window, window_attn_skip_freq=2)
    keywords = {"attention_type": "self", "pg_collection": SimpleNamespace(cp="group"), "cp_comm_type": "a2a"}
    layers = [kind(config=of, layer_number=n, attn_mask_type=CAUSAL, **keywords) for n in (1, 2, 3, 4)]
    assert [layer.layer_number for layer in layers if isinstance(layer, WallfacerCoreAttention)] == ours
    others = [layer for layer in layers if isinstance(layer, Theirs)]
    assert len(others) == 4 - len(ours)
    assert all(layer.keywords == {"attn_mask_type": CAUSAL} | keywords and is_megatrons(layer) for layer in others)


class PlannedState(LoneState):
    """As if this rank were one of many: nothing runs."""

    def transfers(self, group: object, grid: Grid) -> Any:
        return SimpleNamespace(passes=PassCache())


@pytest.mark.parametrize(
    ("q_heads", "kv_heads", "tensor_parallel", "fits"),
    [(8, 4, 1, True), (8, 1, 1, True), (16, 8, 4, True), (6, 3, 1, False), (8, 4, 4, False), (12, 3, 1, False)],
)
def test_heads_that_do_not_divide_are_rejected_when_built(
    q_heads: int, kv_heads: int, tensor_parallel: int, fits: bool
) -> None:
    """A script may build other layers than the command line says."""
    state = PlannedState((0, 19, 2), torch.device("cpu"), settings=Settings(make_plan("ulysses", 4)))
    heads = {
        "num_attention_heads": q_heads,
        "num_query_groups": kv_heads,
        "tensor_model_parallel_size": tensor_parallel,
    }

    def layer() -> WallfacerCoreAttention:
        return core_attention_class(state)(config(**heads), 3, CAUSAL, "self", pg_collection=SimpleNamespace(cp=1))

    if fits:
        assert "head 4" in repr(layer())
        return
    with pytest.raises(WallfacerError, match="layer 3: --wallfacer-head-size 4: must be one of 1"):
        layer()


def q() -> torch.Tensor:
    return torch.randn(4, 2, 2, 8, dtype=torch.float64)


def dense(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    live: torch.Tensor,
    sinks: torch.Tensor | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    """The formula, sbhd: softmax over the live keys and a sink that has no value."""
    scores = torch.einsum("qbhd,kbhd->bhqk", query, key) * (scale or query.shape[-1] ** -0.5)
    scores = scores.masked_fill(~live, float("-inf"))
    if sinks is not None:
        scores = torch.cat([scores, sinks.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)], dim=-1)
    weights = scores.softmax(-1)[..., : key.shape[0]]
    return torch.einsum("bhqk,kbhd->qbhd", weights, value)


def positions() -> tuple[torch.Tensor, torch.Tensor]:
    """Of queries, a column, and of keys, a row."""
    return torch.arange(4)[:, None], torch.arange(4)[None, :]


def test_output_is_megatrons_shape_and_dense_attention() -> None:
    query, key, value = q(), q(), q()
    rows, cols = positions()
    torch.testing.assert_close(build()(query, key, value, None), dense(query, key, value, cols <= rows).flatten(2))


@pytest.mark.parametrize(
    ("window", "before"), [((2, 0), 2), ((2, 3), 2), ((0, 0), 0), ((-1, 0), 9), ((-1, -1), 9), ((2, -1), 2)]
)
def test_a_window_holds_the_keys_from_left_to_the_query_itself(window: tuple[int, int], before: int) -> None:
    """A causal layer sees nothing after the query, whatever the window's right says."""
    query, key, value = q(), q(), q()
    rows, cols = positions()
    out = build(config=config(window_size=window))(query, key, value, None)
    torch.testing.assert_close(out, dense(query, key, value, (cols <= rows) & (rows - cols <= before)).flatten(2))


def test_a_window_without_causality_has_two_sides() -> None:
    query, key, value = q(), q(), q()
    rows, cols = positions()
    out = build(config=config(window_size=(1, 2)), attn_mask_type=SimpleNamespace(name="no_mask"))
    live = (rows - cols <= 1) & (cols - rows <= 2)
    torch.testing.assert_close(out(query, key, value, None), dense(query, key, value, live).flatten(2))


@pytest.mark.parametrize(
    ("skip", "has_window"), [(None, True), (3, False), (2, True), ([1, 1, 0], False), ([0, 0, 1], True)]
)
def test_layers_that_skip_the_window_see_everything_before_them(skip: object, has_window: bool) -> None:
    """Megatron's own function decides; this is layer 3."""
    module = build(config=config(window_size=(2, 0), window_attn_skip_freq=skip))
    assert module._call.mask == Mask(left=2 if has_window else None)


@pytest.mark.parametrize("window", [(2,), (2, -2), 3, (1.5, 0)])
def test_a_window_that_is_none_is_rejected_by_its_flag(window: object) -> None:
    with pytest.raises(WallfacerError, match=r"layer 3: --window-size .*: must be LEFT,RIGHT"):
        build(config=config(window_size=window))


@pytest.mark.parametrize(("kind", "logit"), [("off-by-one", 0.0), ("learnable", 1.0)])
def test_a_sink_takes_its_part_of_the_softmax(kind: str, logit: float) -> None:
    query, key, value = q(), q(), q()
    rows, cols = positions()
    module = build(config=config(softmax_type=kind))
    sinks = torch.full((2,), logit, dtype=torch.float64, requires_grad=True)
    want = dense(query, key, value, cols <= rows, sinks).flatten(2)
    got = module(query, key, value, None)
    torch.testing.assert_close(got, want)
    assert [name for name, _ in module.named_parameters()] == ["softmax_offset"] * (kind == "learnable")
    assert list(module.state_dict()) == ["softmax_offset"] * (kind == "learnable")
    if kind == "learnable":
        weights = torch.randn_like(want)
        (want * weights).sum().backward()
        (got * weights).sum().backward()
        torch.testing.assert_close(module.softmax_offset.grad, sinks.grad)


def test_an_unknown_softmax_is_rejected_by_its_flag() -> None:
    with pytest.raises(WallfacerError, match="layer 3: --softmax-type entmax: must be one of vanilla, off-by-one,"):
        build(config=config(softmax_type="entmax"))


def test_values_may_have_another_width_and_the_scale_is_the_layers() -> None:
    query, key, value = q(), q(), q()[..., :6]
    rows, cols = positions()
    module = build(config=config(multi_latent_attention=True), k_channels=8, v_channels=6, softmax_scale=0.2)
    torch.testing.assert_close(
        module(query, key, value, None), dense(query, key, value, cols <= rows, scale=0.2).flatten(2)
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_type": "cross"}, "layer 3: --wallfacer-cp-size supports only self attention, not cross"),
        ({"attn_mask_type": PADDING}, "layer 3: .*not padding"),
        ({"config": config(attention_dropout=0.1)}, "layer 3: --attention-dropout 0.1: must be 0"),
        ({"config": config(qk_clip=True)}, "layer 3: --qk-clip: must be left out"),
        ({"config": config(log_max_attention_logit=True)}, "layer 3: --log-max-attention-logit: must be left out"),
        ({"config": config(fp8_multi_head_attention=True)}, "layer 3: fp8_multi_head_attention: must be False"),
        ({"config": config(fp8_dot_product_attention=True)}, "layer 3: fp8_dot_product_attention: must be False"),
        ({"attention_dropout": 0.1}, "layer 3: attention_dropout 0.1 is not supported"),
        ({"num_splits": 1}, "layer 3: num_splits 1 is not supported"),
    ],
)
def test_a_layer_that_is_not_supported_is_rejected_when_built(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(WallfacerError, match=message):
        build(**changes)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"attention_bias": torch.zeros(1)}, "layer 3: an attention bias is not supported"),
        ({"attn_mask_type": SimpleNamespace(name="no_mask")}, "layer 3: mask type no_mask differs"),
        ({"attn_mask_type": PADDING}, "layer 3: .*not padding"),
    ],
)
def test_a_call_that_is_not_supported_is_rejected(keywords: dict[str, Any], message: str) -> None:
    with pytest.raises(WallfacerError, match=message):
        build()(q(), q(), q(), None, **keywords)


def test_a_keyword_that_nobody_knows_is_an_error() -> None:
    with pytest.raises(TypeError, match="unheard_of"):
        core_attention_class(build().state)(config(), 1, CAUSAL, "self", unheard_of=1)


def test_nothing_is_saved_and_transformer_engines_extra_state_is_ignored() -> None:
    module = build()
    assert module.state_dict() == {}
    assert module.sharded_state_dict() == {}
    assert not module.load_state_dict({"_extra_state": torch.zeros(1)}, strict=True).unexpected_keys
