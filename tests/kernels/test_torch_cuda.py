"""The operators that are in the PyTorch that is installed, by their schemas: they have no kernels on a CPU."""

from __future__ import annotations

import pytest
import torch


@pytest.mark.parametrize(
    ("name", "begins"),
    [
        (
            "_flash_attention_forward",
            "query key value cum_seq_q cum_seq_k max_q max_k dropout_p is_causal return_debug_mask",
        ),
        (
            "_flash_attention_backward",
            "grad_out query key value out logsumexp cum_seq_q cum_seq_k max_q max_k dropout_p is_causal",
        ),
        (
            "_scaled_dot_product_cudnn_attention",
            "query key value attn_bias compute_log_sumexp dropout_p is_causal return_debug_mask",
        ),
        (
            "_scaled_dot_product_cudnn_attention_backward",
            "grad_out query key value out logsumexp philox_seed philox_offset attn_bias cum_seq_q cum_seq_k max_q max_k"
            " dropout_p is_causal",
        ),
    ],
)
def test_arguments_are_in_the_order_in_which_they_are_given(name: str, begins: str) -> None:
    schema = getattr(torch.ops.aten, name).default._schema
    plain = [argument.name for argument in schema.arguments if not argument.kwarg_only]
    assert plain[: len(begins.split())] == begins.split()
    keywords = {argument.name for argument in schema.arguments if argument.kwarg_only}
    assert keywords >= ({"scale", "window_size_left", "window_size_right"} if "flash" in name else {"scale"})
