"""Parameters as published, operations and bytes as counted by hand."""

from __future__ import annotations

import pytest

from megatron_wallfacer.errors import OptionError
from megatron_wallfacer.planning.model import MODELS, Model, model_named, token_count

SMALL = Model("small", 2, 8, 16, q_heads=4, kv_heads=2, head_dim=2, vocabulary=10)


def parameters(model: Model) -> int:
    """All layers, embedding, LM head and the last norm."""
    return model.layers * model.layer_parameters + model.vocabulary_parameters + model.hidden


@pytest.mark.parametrize(
    ("name", "billions"),
    [("llama3-8b", 8.03), ("llama3-70b", 70.55), ("qwen3-8b", 8.19), ("gpt-7b", 6.65), ("gpt-3b", 2.62)],
)
def test_models_have_the_parameters_that_they_are_named_after(name: str, billions: float) -> None:
    assert parameters(model_named(name)) / 1e9 == pytest.approx(billions, abs=0.01)


def test_parameters_by_hand() -> None:
    q = out = 8 * 8
    kv, mlp, norms = 2 * 8 * 4, 3 * 8 * 16, 2 * 8
    assert SMALL.layer_parameters == q + out + kv + mlp + norms
    assert parameters(SMALL) == 2 * SMALL.layer_parameters + 2 * 10 * 8 + 8


def test_experts_hold_more_and_compute_as_many_as_are_chosen() -> None:
    dense = MODELS["qwen3-8b"]
    sparse = Model("sparse", 36, 4096, 12288, 32, 8, 128, 151936, experts=8, top_k=2)
    assert sparse.layer_parameters - dense.layer_parameters == 7 * dense.expert_parameters + 8 * 4096
    assert sparse.matmul_flops() - dense.matmul_flops() == 2 * dense.expert_parameters


def test_a_step_is_six_operations_a_matrix_parameter_and_attention() -> None:
    model, tokens = MODELS["llama3-8b"], 8192
    norms = model.layers * 2 * model.hidden + model.hidden
    matrices = parameters(model) - norms - model.vocabulary * model.hidden
    attention = 3 * 4 * tokens**2 * model.layers * 32 * 128
    assert model.step_flops(tokens, causal=False) == pytest.approx(6 * matrices * tokens + attention)
    assert model.step_flops(tokens, causal=True) == pytest.approx(6 * matrices * tokens + attention / 2)


def test_heads_that_do_not_divide_are_an_error() -> None:
    shape = MODELS["llama3-8b"].shape(1024, tp=4)
    assert (shape.q_heads, shape.kv_heads, shape.tokens) == (8, 2, 1024)
    with pytest.raises(OptionError, match="tp=16: must be a divisor of 32 query and 8 kv heads"):
        MODELS["llama3-8b"].shape(1024, tp=16)


def test_an_unknown_model_is_an_error_with_the_names() -> None:
    with pytest.raises(OptionError, match="model=gpt-5: must be one of gpt-3b, gpt-7b, llama3-8b"):
        model_named("gpt-5")


@pytest.mark.parametrize(("text", "tokens"), [("65536", 65536), ("128K", 131072), ("1m", 2**20), ("2G", 2**31)])
def test_lengths(text: str, tokens: int) -> None:
    assert token_count(text) == tokens


@pytest.mark.parametrize("text", ["", "0", "-1", "1.5M", "1T", "K"])
def test_texts_that_are_no_length(text: str) -> None:
    with pytest.raises(OptionError, match="must be a number of tokens such as"):
        token_count(text)
