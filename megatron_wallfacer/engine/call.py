"""A call of attention: everything about it but its tensors."""

from __future__ import annotations

import itertools
import weakref
from dataclasses import dataclass, field
from functools import lru_cache

from torch import Tensor

from megatron_wallfacer.engine.blocks import Sizes
from megatron_wallfacer.engine.run import Runtime
from megatron_wallfacer.errors import WallfacerError
from megatron_wallfacer.schedule.heads import check_heads, head_groups
from megatron_wallfacer.schedule.mask import CAUSAL, Mask, pattern_of
from megatron_wallfacer.schedule.ops import Schedule
from megatron_wallfacer.schedule.plan import Plan
from megatron_wallfacer.schedule.schedule import backward_schedule, forward_schedule

# A training run asks for the same few schedules at every layer and step.
_forward_schedule = lru_cache(maxsize=64)(forward_schedule)
_backward_schedule = lru_cache(maxsize=64)(backward_schedule)
_pattern = lru_cache(maxsize=64)(pattern_of)


@dataclass(frozen=True)
class Call:
    """Everything about one call of attention but its tensors.

    Attributes:
        plan: grid and choices.
        runtime: transfers, kernel, scale.
        mask: which pairs are live.
        keep_gathered_q: save the team's queries for backward instead of gathering them again.
        number: by which :func:`call_of_number` knows it, for as long as it lives.
    """

    plan: Plan
    runtime: Runtime
    mask: Mask = CAUSAL
    keep_gathered_q: bool = False
    number: int = field(default_factory=itertools.count().__next__, init=False, compare=False)

    def __post_init__(self) -> None:
        _calls[self.number] = self

    def check(self, q: Tensor, k: Tensor) -> None:
        """Whether heads and mask fit the rank's own tensors, sbhd.

        Raises:
            OptionError: the heads do not divide along the head axis, or the mask does not fit the sequence.
        """
        cp_size = self.plan.grid.cp_size
        check_heads(self.plan, q.shape[2], k.shape[2])
        self.mask.check(cp_size, cp_size * q.shape[0])

    def sizes(self, like: Tensor, kv_heads: int, head_dim: int, v_head_dim: int) -> Sizes:
        """Sizes of this call's tensors.

        Args:
            like: sbhd, the rank's own queries or output.
            kv_heads: of the rank's own keys and values.
            head_dim: channels of a head's queries and keys.
            v_head_dim: channels of its values.
        """
        parts = self.plan.grid.head * head_groups(self.plan, like.shape[2], kv_heads)
        return Sizes.of(like, kv_heads, head_dim, v_head_dim, parts)

    def forward_schedule(self, sizes: Sizes) -> Schedule:
        """This rank's, for tensors of these sizes."""
        return _forward_schedule(self.plan, self.runtime.transfers.groups.rank, **self._options(sizes))

    def backward_schedule(self, sizes: Sizes) -> Schedule:
        """This rank's, for tensors of these sizes."""
        return _backward_schedule(self.plan, self.runtime.transfers.groups.rank, **self._options(sizes))

    def _options(self, sizes: Sizes) -> dict[str, object]:
        grid = self.plan.grid
        return {
            "groups": sizes.parts // grid.head,
            "q_kept": self.keep_gathered_q,
            "causal": self.mask.right == 0,
            "pattern": _pattern(self.mask, grid.cp_size, sizes.chunk),
        }


# An operator takes numbers, not objects; whoever may call it again holds the call.
_calls: weakref.WeakValueDictionary[int, Call] = weakref.WeakValueDictionary()


def call_of_number(number: int) -> Call:
    """The call that has this number.

    Raises:
        WallfacerError: nobody holds it any longer.
    """
    call = _calls.get(number)
    if call is None:
        raise WallfacerError(f"attention call {number} is gone: keep the Call for as long as its number is used")
    return call
