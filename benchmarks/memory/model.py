"""One training step of Megatron's GPT model, with few layers, counted operator by operator."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from unittest import mock

import torch

from benchmarks.memory import opaque
from benchmarks.memory.live import LiveBytes, Peak
from benchmarks.memory.opaque import EngineAttention, FusedNorm
from benchmarks.memory.setting import Setting
from megatron_wallfacer.engine import operators
from megatron_wallfacer.engine.call import Call, Runtime
from megatron_wallfacer.engine.transfers import Transfers
from megatron_wallfacer.kernels.protocol import Kernel
from megatron_wallfacer.planning.inventory import Activations


def count_step(setting: Setting, transfers: Transfers, kernel: Kernel, smallest: int) -> dict[str, Peak]:
    """Return the peak of each moment of ``planning.inventory.MOMENTS`` on this rank, in bf16.

    Megatron's CPU runtime must be installed, and its process groups made. Fused kernels (norm, SwiGLU, rotary
    positions, attention, the sums of its results) count as their results and what they save. Parameters and their
    gradients are not counted.

    Args:
        setting: model and grid.
        transfers: of attention's grid.
        kernel: computes attention.
        smallest: bytes of the smallest storage that is counted.
    """
    work = setting.work
    with _replaced():
        model = build(setting, transfers, kernel)
        live = LiveBytes(model.parameters(), smallest)
        _watch(model, live)
        tokens = torch.zeros(1, work.tokens, dtype=torch.long)
        with live:
            run_step(model, work, tokens)
    return {moment: peak for moment, peak in live.peaks.items() if moment}


def run_step(model: Any, work: Activations, tokens: torch.Tensor) -> None:
    """Run a model forward and backward in its tiles.

    Args:
        model: made by :func:`build`.
        work: its work.
        tokens: ``[1, tokens per rank]``, also the positions and labels.
    """
    from megatron.core.transformer.mlp import MLP

    from megatron_wallfacer.megatron.loss_tiles import tiled_loss
    from megatron_wallfacer.megatron.token_tiles import tiled_mlp_forward

    tiled = {"output_processor": partial(tiled_loss, work.loss_tiles)} if work.loss_tiles > 1 else {}
    forward = tiled_mlp_forward(MLP.forward, work.mlp_tiles) if work.mlp_tiles > 1 else MLP.forward
    with mock.patch.object(MLP, "forward", forward):
        model(tokens, tokens, None, labels=tokens, **tiled).sum().backward()


def _watch(model: Any, live: LiveBytes) -> None:
    """Name modules and moments; drop the gradients of parameters."""

    def enter(name: str) -> Any:
        return lambda *_: setattr(live, "module", name)

    def begin(moment: str) -> Any:
        return lambda *_: opaque.mark(moment)

    for name, module in model.named_modules():
        module.register_forward_pre_hook(enter(name))
        if name.endswith("final_layernorm"):
            # From here to its backward pass there is the head.
            module.register_forward_hook(begin("head"))
        if name.endswith("layernorm"):
            module.register_full_backward_hook(begin("attention" if name.endswith("pre_mlp_layernorm") else ""))
    opaque.count_with(live)


def build(setting: Setting, transfers: Transfers, kernel: Kernel) -> Any:
    """Return Megatron's GPT model in bf16, on the CPU, uninitialized. Gradients of its parameters are dropped.

    Args:
        setting: sizes and grid.
        transfers: of attention's grid.
        kernel: computes attention.
    """
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

    work, size, cp_size = setting.work, setting.work.model, setting.plan.grid.cp_size
    call = Call(setting.plan, Runtime(transfers, kernel, size.head_dim**-0.5))
    replay: dict[str, Any] = {}
    if work.recompute != "none":
        replay = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    config = TransformerConfig(
        num_layers=work.layers,
        hidden_size=size.hidden,
        num_attention_heads=size.q_heads,
        num_query_groups=size.kv_heads,
        kv_channels=size.head_dim,
        ffn_hidden_size=size.ffn_hidden,
        gated_linear_unit=size.swiglu,
        activation_func=torch.nn.functional.silu,
        bias_activation_fusion=True,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=torch.bfloat16,
        bf16=True,
        normalization="RMSNorm",
        masked_softmax_fusion=False,
        bias_dropout_fusion=False,
        perform_initialization=False,
        use_cpu_initialization=True,
        tensor_model_parallel_size=work.tp,
        sequence_parallel=work.tp > 1,
        context_parallel_size=cp_size,
        **replay,
    )
    spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    parts = spec.submodules
    norm = FusedNorm if work.fused_norms else parts.input_layernorm
    keep = work.recompute == "keep-attention"
    parts.self_attention.submodules.core_attention = lambda *_, **__: EngineAttention(call, keep=keep)
    parts.input_layernorm = parts.pre_mlp_layernorm = norm
    block = TransformerBlockSubmodules(layer_specs=[spec] * work.layers, layer_norm=norm)
    model = GPTModel(config, block, size.vocabulary, work.tokens * cp_size, position_embedding_type="rope")
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda one: setattr(one, "grad", None))
    return model


@contextmanager
def _replaced() -> Iterator[None]:
    """Fused kernels as opaque functions, and the engine's passes without the dispatcher, which would hide them."""
    from megatron.core.transformer import attention, mlp

    with ExitStack() as stack:
        for owner, name, value in (
            (attention, "apply_rotary_pos_emb", lambda x, *_, **__: opaque.rotary(x)),
            (mlp, "bias_swiglu_impl", lambda x, *_: opaque.swiglu(x)),
            (operators, "attention", operators.run_attention),
            (operators, "attention_backward", operators.run_attention_backward),
        ):
            stack.enter_context(mock.patch.object(owner, name, value))
        yield
