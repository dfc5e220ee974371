"""The step of one rank at full size, on tensors without memory: kernels compute nothing, messages do nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from benchmarks.gpu.one_rank import no_transfers
from benchmarks.memory.live import SMALLEST, Peak
from benchmarks.memory.model import count_step
from benchmarks.memory.setting import Setting
from megatron_wallfacer.engine import steps
from megatron_wallfacer.kernels.protocol import Capabilities


class FreshResults:
    """A kernel that allocates its results and computes nothing."""

    name = "none"
    capabilities = Capabilities()

    def forward(self, q: Any, k: Any, v: Any, tile: Any, spec: Any) -> tuple[Any, Any]:
        return q.new_empty((*q.shape[:3], v.shape[-1])), q.new_empty(q.shape[:3], dtype=torch.float32)

    def backward(self, dout: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, tile: Any, spec: Any) -> tuple[Any, ...]:
        return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))


def count(setting: Setting) -> dict[str, Peak]:
    """Return the peak of each moment on the rank whose attention needs most memory. See ``count_step``."""
    size = setting.plan.grid.cp_size
    with groups_without_messages(setting.work.tp, size), _without_values(), FakeTensorMode(allow_non_fake_inputs=True):
        return count_step(setting, no_transfers(setting.plan), FreshResults(), SMALLEST)


@contextmanager
def groups_without_messages(tp: int, cp_size: int) -> Iterator[None]:
    """Make Megatron's process groups, whose messages do nothing.

    Args:
        tp: tensor-parallel size.
        cp_size: context-parallel size.
    """
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
def _without_values() -> Iterator[None]:
    """Row operations and random states, which need values, replaced by nothing."""
    from megatron.core.tensor_parallel import random

    with ExitStack() as stack:
        for owner, name, value in (
            (steps, "merge_rows", lambda *_: None),
            (steps, "sum_rows", lambda *_: None),
            (random, "_get_all_rng_states", lambda: ()),
            (random, "_set_all_rng_states", lambda *_: None),
            (random, "_fork_rng", nullcontext),
            (random.CudaRNGStatesTracker, "fork", lambda *_: nullcontext()),
        ):
            stack.enter_context(mock.patch.object(owner, name, value))
        yield
