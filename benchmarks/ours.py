"""This project's schemes, run by its engine as :func:`megatron_wallfacer.attention.attention` runs it.

All that the benchmarks know of the engine's objects is in this file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_wallfacer.engine.autograd import attend
from megatron_wallfacer.engine.call import Call, Runtime
from megatron_wallfacer.engine.groups import connect
from megatron_wallfacer.engine.timeline import Observer, no_observer
from megatron_wallfacer.engine.transfers import Transfers
from megatron_wallfacer.kernels.protocol import Kernel
from megatron_wallfacer.schedule.heads import head_groups
from megatron_wallfacer.schedule.layout import shard_chunks
from megatron_wallfacer.schedule.ops import Schedule
from megatron_wallfacer.schedule.plan import Plan
from megatron_wallfacer.schedule.schedule import backward_schedule, forward_schedule
from megatron_wallfacer.schedule.schemes import make_plan
from megatron_wallfacer.schedule.volume import Shape


class Ours:
    """One scheme of :mod:`megatron_wallfacer.schedule.schemes`."""

    package = None
    check_dtype = "float32"
    note = ""

    def __init__(self, label: str, ranks: int, heads: tuple[int, int], arguments: Mapping[str, Any]) -> None:
        """With the arguments of ``make_plan``; ``keep_gathered_q`` among them is an argument of ``attention``.

        Raises:
            OptionError: there is no such plan for these query and kv heads.
        """
        arguments = dict(arguments)
        self.label = label
        self._keep_gathered_q = bool(arguments.pop("keep_gathered_q", False))
        self._plan: Plan = make_plan(cp_size=ranks, q_heads=heads[0], kv_heads=heads[1], **arguments)
        self._transfers: Transfers | None = None
        self.observer: Observer = no_observer

    def prepare(self) -> None:
        self._transfers = Transfers(connect(None, self._plan.grid))

    def shard(self, whole: Tensor) -> Tensor:
        size = self._plan.grid.cp_size
        chunks = whole.chunk(2 * size, dim=1)
        return torch.cat([chunks[chunk] for chunk in shard_chunks(dist.get_rank(), size)], dim=1)

    def bind(self, kernel: Kernel, head_dim: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        """Attention of q, k and v, sbhd, with all else bound once, as Megatron's module binds it."""
        runtime = Runtime(self._transfers, kernel, head_dim**-0.5, self.observer)
        return partial(attend, call=Call(self._plan, runtime, keep_gathered_q=self._keep_gathered_q))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, kernel: Kernel) -> Tensor:
        return self.bind(kernel, q.shape[-1])(*(x.transpose(0, 1) for x in (q, k, v))).transpose(0, 1)

    def schedules(self, rank: int, shape: Shape) -> tuple[Schedule, Schedule]:
        options = {
            "groups": head_groups(self._plan, shape.q_heads, shape.kv_heads),
            "keep_gathered_q": self._keep_gathered_q,
        }
        return forward_schedule(self._plan, rank, **options), backward_schedule(self._plan, rank, **options)
