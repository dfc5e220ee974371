"""The module refuses what it cannot do, also where a script sets it in code and no flag was checked."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_wallfacer.errors import WallfacerError
from megatron_wallfacer.megatron.arguments import Settings
from megatron_wallfacer.megatron.core_attention import WallfacerCoreAttention, core_attention_class
from megatron_wallfacer.megatron.session import Session
from megatron_wallfacer.schedule.schemes import make_plan

CAUSAL, PADDING = SimpleNamespace(name="causal"), SimpleNamespace(name="padding")


class LoneSession(Session):
    """A session of one rank, without process groups."""

    def transfers(self, group: object) -> Any:
        from megatron_wallfacer.engine.groups import connect
        from megatron_wallfacer.engine.transfers import Transfers

        return Transfers(connect(None, self.settings.plan.grid))


def config(**changes: object) -> SimpleNamespace:
    plain = {"kv_channels": 8, "params_dtype": torch.float64, "attention_dropout": 0.0, "window_size": None}
    plain |= {"softmax_type": "vanilla", "num_attention_heads": 2, "num_query_groups": 2}
    return SimpleNamespace(**(plain | {"tensor_model_parallel_size": 1} | changes))


def build(*, attn_mask_type: Any = CAUSAL, attention_type: str = "self", **changes: Any) -> WallfacerCoreAttention:
    session = LoneSession((0, 19, 2), torch.device("cpu"), settings=Settings(make_plan("ring", 1), "auto", False))
    keywords = {
        name: changes.pop(name) for name in ("attention_dropout", "v_channels", "num_splits") if name in changes
    }
    return core_attention_class(session)(
        config=changes.pop("config", config()),
        layer_number=3,
        attn_mask_type=attn_mask_type,
        attention_type=attention_type,
        pg_collection=SimpleNamespace(cp="group"),
        **keywords,
    )


class PlannedSession(LoneSession):
    """As if this rank were one of many: nothing runs."""

    def transfers(self, group: object) -> Any:
        return None


@pytest.mark.parametrize(
    ("q_heads", "kv_heads", "tensor_parallel", "fits"),
    [(8, 4, 1, True), (8, 1, 1, True), (16, 8, 4, True), (6, 3, 1, False), (8, 4, 4, False), (12, 3, 1, False)],
)
def test_heads_that_do_not_divide_are_refused_when_built(
    q_heads: int, kv_heads: int, tensor_parallel: int, fits: bool
) -> None:
    """A script may build other layers than the command line says."""
    session = PlannedSession((0, 19, 2), torch.device("cpu"), settings=Settings(make_plan("ulysses", 4), "auto", False))
    heads = {
        "num_attention_heads": q_heads,
        "num_query_groups": kv_heads,
        "tensor_model_parallel_size": tensor_parallel,
    }

    def layer() -> WallfacerCoreAttention:
        return core_attention_class(session)(config(**heads), 3, CAUSAL, "self", pg_collection=SimpleNamespace(cp=1))

    if fits:
        assert "head 4" in repr(layer())
        return
    with pytest.raises(WallfacerError, match="layer 3: --wallfacer-head-size 4: must be one of 1"):
        layer()


def q() -> torch.Tensor:
    return torch.randn(4, 2, 2, 8, dtype=torch.float64)


def test_output_is_megatrons_shape_and_dense_attention() -> None:
    query, key, value = q(), q(), q()
    out = build()(query, key, value, None)
    dense = torch.nn.functional.scaled_dot_product_attention(
        *(x.permute(1, 2, 0, 3) for x in (query, key, value)), is_causal=True
    )
    torch.testing.assert_close(out, dense.permute(2, 0, 1, 3).flatten(2))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_type": "cross"}, "layer 3: --wallfacer-cp-size supports only self attention, not cross"),
        ({"attn_mask_type": PADDING}, "layer 3: .*not padding"),
        ({"config": config(attention_dropout=0.1)}, "layer 3: attention_dropout 0.1 is not supported"),
        ({"config": config(window_size=(8, 0))}, r"layer 3: window_size \(8, 0\) is not supported"),
        ({"config": config(softmax_type="learnable")}, "layer 3: softmax_type learnable is not supported"),
        ({"config": config(multi_latent_attention=True)}, "layer 3: multi_latent_attention True is not supported"),
        ({"config": config(fp8_dot_product_attention=True)}, "layer 3: fp8_dot_product_attention True"),
        ({"attention_dropout": 0.1}, "layer 3: attention_dropout 0.1 is not supported"),
        ({"v_channels": 16}, "layer 3: v_channels 16 is not supported"),
        ({"num_splits": 1}, "layer 3: num_splits 1 is not supported"),
    ],
)
def test_a_layer_that_is_not_supported_is_refused_when_built(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(WallfacerError, match=message):
        build(**changes)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"attention_bias": torch.zeros(1)}, "layer 3: an attention bias is not supported"),
        ({"packed_seq_params": object()}, "layer 3: packed sequences"),
        ({"attn_mask_type": SimpleNamespace(name="no_mask")}, "layer 3: mask type no_mask differs"),
        ({"attn_mask_type": PADDING}, "layer 3: .*not padding"),
    ],
)
def test_a_call_that_is_not_supported_is_refused(keywords: dict[str, Any], message: str) -> None:
    with pytest.raises(WallfacerError, match=message):
        build()(q(), q(), q(), None, **keywords)


def test_a_keyword_that_nobody_knows_is_an_error() -> None:
    with pytest.raises(TypeError, match="unheard_of"):
        core_attention_class(build().session)(config(), 1, CAUSAL, "self", unheard_of=1)


def test_nothing_is_saved_and_transformer_engines_extra_state_is_ignored() -> None:
    module = build()
    assert module.state_dict() == {}
    assert module.sharded_state_dict() == {}
    assert not module.load_state_dict({"_extra_state": torch.zeros(1)}, strict=True).unexpected_keys
