"""One training step of Megatron's GPT model, full width and few layers, on tensors without memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from benchmarks.gpu.one_rank import NoTransfers
from benchmarks.memory.live import LiveBytes, Peak
from benchmarks.memory.opaque import EngineAttention, FusedNorm, Rotary, SwiGlu
from megatron_wallfacer.engine import operators, steps
from megatron_wallfacer.engine.call import Call, Runtime
from megatron_wallfacer.engine.groups import AxisGroups
from megatron_wallfacer.kernels.capabilities import Capabilities
from megatron_wallfacer.planning.inventory import Activations
from megatron_wallfacer.schedule.formulas import busiest_rank
from megatron_wallfacer.schedule.plan import Plan


class FreshResults:
    """A kernel that allocates its results and computes nothing."""

    name = "none"
    capabilities = Capabilities()

    def forward(self, q: Any, k: Any, v: Any, tile: Any, spec: Any) -> tuple[Any, Any]:
        return q.new_empty((*q.shape[:3], v.shape[-1])), q.new_empty(q.shape[:3], dtype=torch.float32)

    def backward(self, dout: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, tile: Any, spec: Any) -> tuple[Any, ...]:
        return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))


@dataclass(frozen=True)
class Setting:
    """What is counted.

    Attributes:
        work: model, tokens per rank, tensor-parallel size, layers, recomputation and tiles.
        plan: grid of attention.
    """

    work: Activations
    plan: Plan


def count(setting: Setting) -> dict[str, Peak]:
    """Return the peak of each moment of ``planning.inventory.MOMENTS`` on one rank, in bf16.

    Megatron's CPU runtime must be installed. Fused kernels (norm, SwiGLU, rotary positions, attention, the sums of its
    results) count as their results and what they save. Parameters and their gradients are not counted.
    """
    work = setting.work
    with _groups(work.tp, setting.plan.grid.cp_size), _replaced(), FakeTensorMode(allow_non_fake_inputs=True):
        model = _build(setting)
        live = LiveBytes(model.parameters())
        _watch(model, live)
        tokens = torch.zeros(1, work.tokens, dtype=torch.long)
        with live:
            _step(model, work, tokens)
    return {moment: peak for moment, peak in live.peaks.items() if moment}


def _step(model: Any, work: Activations, tokens: torch.Tensor) -> None:
    from megatron.core.transformer.mlp import MLP

    from megatron_wallfacer.megatron.loss_tiles import TiledLoss
    from megatron_wallfacer.megatron.mlp_tiles import tiled_mlp_forward

    tiled = {"output_processor": TiledLoss(work.loss_tiles)} if work.loss_tiles > 1 else {}
    forward = tiled_mlp_forward(MLP.forward, work.mlp_tiles) if work.mlp_tiles > 1 else MLP.forward
    with mock.patch.object(MLP, "forward", forward):
        model(tokens, tokens, None, labels=tokens, **tiled).sum().backward()


def _watch(model: Any, live: LiveBytes) -> None:
    """Name modules and moments; drop the gradients of parameters."""

    def enter(name: str) -> Any:
        return lambda *_: setattr(live, "module", name)

    for name, module in model.named_modules():
        module.register_forward_pre_hook(enter(name))
        if name.endswith("pre_mlp_layernorm"):
            module.before = "attention"
        elif name.endswith("final_layernorm"):
            # From here to its backward pass there is the head.
            module.register_forward_hook(lambda *_: setattr(live, "moment", "head"))
            module.before = ""
        elif name.endswith("input_layernorm"):
            module.before = ""
    FusedNorm.mark = EngineAttention.mark = SwiGlu.mark = lambda moment: setattr(live, "moment", moment)
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda one: setattr(one, "grad", None))


def _build(setting: Setting) -> Any:
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

    work, size, cp_size = setting.work, setting.work.model, setting.plan.grid.cp_size
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
    parts.self_attention.submodules.core_attention = lambda *_, **__: _attention(setting)
    parts.input_layernorm = parts.pre_mlp_layernorm = FusedNorm
    block = TransformerBlockSubmodules(layer_specs=[spec] * work.layers, layer_norm=FusedNorm)
    return GPTModel(config, block, size.vocabulary, work.tokens * cp_size, position_embedding_type="rope")


def _attention(setting: Setting) -> EngineAttention:
    plan = setting.plan
    size = plan.grid.cp_size
    groups = AxisGroups(plan.grid, busiest_rank(plan), tuple(range(size)), ("node",) * size, {})
    call = Call(plan, Runtime(NoTransfers(groups), FreshResults(), setting.work.model.head_dim**-0.5))
    return EngineAttention(call, keep=setting.work.recompute == "keep-attention")


@contextmanager
def _groups(tp: int, cp_size: int) -> Iterator[None]:
    """Megatron's process groups, whose messages do nothing."""
    from megatron.core import parallel_state

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=tp * cp_size)
    sizes = {"tensor_model_parallel_size": tp, "context_parallel_size": cp_size}
    parallel_state.initialize_model_parallel(**sizes, create_gloo_process_groups=False)
    try:
        yield
    finally:
        parallel_state.destroy_model_parallel()
        parallel_state.destroy_global_memory_buffer()
        dist.destroy_process_group()


@contextmanager
def _replaced() -> Iterator[None]:
    """Fused kernels as opaque functions, the engine without the dispatcher, and no random states."""
    from megatron.core.tensor_parallel import random
    from megatron.core.transformer import attention, mlp

    with ExitStack() as stack:
        for owner, name, value in (
            (attention, "apply_rotary_pos_emb", lambda x, *_, **__: Rotary.apply(x)),
            (mlp, "bias_swiglu_impl", lambda x, *_: SwiGlu.apply(x)),
            (operators, "attention", operators.run_attention),
            (operators, "attention_backward", operators.run_attention_backward),
            (steps, "merge_rows", lambda *_: None),
            (steps, "sum_rows", lambda *_: None),
            (random, "_get_all_rng_states", lambda: ()),
            (random, "_set_all_rng_states", lambda *_: None),
            (random, "_fork_rng", nullcontext),
            (random.CudaRNGStatesTracker, "fork", lambda *_: nullcontext()),
        ):
            stack.enter_context(mock.patch.object(owner, name, value))
        yield
