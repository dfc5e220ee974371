"""The inventory of memory lists every buffer, and its sizes are those of the tensors."""

from __future__ import annotations

import pytest

from megatron_wallfacer.planning.attention_memory import AttentionMemory
from megatron_wallfacer.planning.inventory import MOMENTS, Activations, bytes_at, inventory, peak
from megatron_wallfacer.planning.model import MODELS

LLAMA, TOKENS = MODELS["llama3-8b"], 131072
#: Bytes of one tensor of the residual stream.
UNIT = 2 * LLAMA.hidden * TOKENS


def activations(**options: object) -> Activations:
    return Activations(LLAMA, TOKENS, **{"layers": 2, **options})


def test_logits_are_the_peak_unless_they_are_tiled() -> None:
    moment, nbytes = peak(inventory(activations()))
    assert moment == "head"
    # Two layer inputs, input and output of the last norm, logits in bf16 and fp32.
    assert nbytes == 4 * UNIT + 6 * LLAMA.vocabulary * TOKENS
    assert peak(inventory(activations(loss_tiles=128)))[0] == "mlp"
    assert (
        peak(inventory(activations(loss_tiles=128, mlp_tiles=16, attention=AttentionMemory(backward=UNIT))))[0]
        == "attention"
    )


def test_backward_of_an_untiled_mlp() -> None:
    # gate and up, their gradient, and the gradient of the activation function's output: 7 + 7 + 3.5 units.
    tiled, whole = (bytes_at(inventory(activations(mlp_tiles=tiles)), "mlp") for tiles in (16, 1))
    assert whole - tiled == pytest.approx((17.5 * 15 / 16 - 1) * UNIT)


@pytest.mark.parametrize("recompute", ["none", "keep-attention", "full"])
def test_each_further_layer_adds_what_it_saves(recompute: str) -> None:
    """Llama 3 8B in units: input 1; output 1 and lse 1/64; norms and residual 3, q, k, v 2.75; MLP 10.5."""
    saved = {"full": 1, "keep-attention": 2 + 1 / 64, "none": 2 + 1 / 64 + 3 + 2.75 + 10.5}[recompute]
    for moment in MOMENTS:
        two, three = (bytes_at(inventory(activations(recompute=recompute, layers=n)), moment) for n in (2, 3))
        assert three - two == pytest.approx(saved * UNIT), moment


def test_tensor_parallelism_halves_all_but_what_is_gathered() -> None:
    one, two = activations(mlp_tiles=4), Activations(LLAMA, TOKENS, tp=2, layers=2, mlp_tiles=4)
    assert bytes_at(inventory(two), "attention") == pytest.approx(bytes_at(inventory(one), "attention") / 2 + UNIT)
