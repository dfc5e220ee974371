"""Reuse attention outputs when Megatron recomputes a layer: ``--wallfacer-keep-attention-output``.

With activation recomputation, the forward pass of a layer runs twice. The first run, under ``torch.no_grad``, stores
attention's output and the tensors that backward needs. The second run, in backward, reuses the stored tensors, so
attention does not compute and communicate again. DISTFLASHATTN (arXiv 2310.03294) calls this method
rematerialization-aware gradient checkpointing.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from megatron_wallfacer.engine.autograd import ForwardResult, attend, run_forward
from megatron_wallfacer.engine.call import Call
from megatron_wallfacer.errors import WallfacerError
from megatron_wallfacer.megatron.flags import flag_name

FLAG = flag_name("keep_attention_output")
SAMPLED_ROWS = 8
_keepers: weakref.WeakSet[Keeper] = weakref.WeakSet()


class Keeper:
    """Queue of the forward results of one attention layer, which are kept until Megatron recomputes the layer.

    A pipeline stage recomputes its micro-batches in the order in which their forward passes ran.
    """

    def __init__(self, where: str) -> None:
        self._where = where
        #: Function that stores the results of a pass, by default on the device, and returns a function that loads them.
        self.hold: Callable[[ForwardResult], Callable[[], ForwardResult]] = lambda finished: lambda: finished
        self._kept: deque[tuple[tuple[Tensor, ...], Callable[[], ForwardResult]]] = deque()
        _check_after_steps()
        _keepers.add(self)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, call: Call, *, sinks: Tensor | None = None) -> Tensor:
        """Run :func:`megatron_wallfacer.engine.autograd.attend` for a module in training.

        Raises:
            WallfacerError: The layer is recomputed, but no stored pass has the same queries and keys.
        """
        if not torch.is_grad_enabled():
            finished = run_forward(q, k, v, call, sinks)
            self._kept.append((_sample(q, k), self.hold(finished)))
        else:
            finished = self._take(q, k) if self._kept else None
        return attend(q, k, v, call, finished, sinks)

    def _take(self, q: Tensor, k: Tensor) -> ForwardResult:
        wanted = _sample(q, k)
        for index, (sample, take) in enumerate(self._kept):
            if all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(sample, wanted, strict=True)):
                del self._kept[index]
                return take()
        raise WallfacerError(
            f"{self._where}: {FLAG}: must be left out, because queries and keys of a recomputed forward pass "
            f"match none of the {len(self._kept)} kept forward passes"
        )

    def check_empty(self) -> None:
        """Raise a WallfacerError if results are left at the end of a step, because a layer was not recomputed."""
        if self._kept:
            raise WallfacerError(
                f"{self._where}: {FLAG}: must be left out, because {len(self._kept)} forward passes without gradients "
                "were not recomputed by the end of the step"
            )


def _sample(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Copy a few numbers of each tensor: some rows, all heads, one channel."""
    return tuple(x.detach()[:: max(1, x.shape[0] // SAMPLED_ROWS)].select(-1, 0).clone() for x in tensors)


@cache
def _check_after_steps() -> None:
    register_optimizer_step_post_hook(lambda *_: [keeper.check_empty() for keeper in _keepers])
