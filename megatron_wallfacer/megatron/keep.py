"""Attention is not run again where Megatron recomputes a layer: ``--wallfacer-keep-attention-output``.

Under a checkpoint a forward runs twice: first without gradients, then once more in backward, with them. The first one
leaves its output and what backward wants of it here, the second one takes them up, so that neither the kernels nor the
messages of forward are repeated. The paper calls it a rematerialisation-aware checkpoint.
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
    """What one attention layer has run forward and will be asked for again.

    Several micro-batches may be on their way. A pipeline takes them up in the order in which they ran.

    Args:
        where: the layer, for messages.
    """

    def __init__(self, where: str) -> None:
        self._where = where
        #: Keeps a finished pass until the returned function is called.
        self.hold: Callable[[ForwardResult], Callable[[], ForwardResult]] = on_device
        self._kept: deque[tuple[tuple[Tensor, ...], Callable[[], ForwardResult]]] = deque()
        _watch(self)

    @property
    def waiting(self) -> int:
        """Forward passes that have not been taken up yet."""
        return len(self._kept)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, call: Call, *, sinks: Tensor | None = None) -> Tensor:
        """As :func:`megatron_wallfacer.engine.autograd.attend`, for a module that is in training.

        Raises:
            WallfacerError: this forward is a replay, but not of one that was kept.
        """
        if not torch.is_grad_enabled():
            finished = run_forward(q, k, v, call, sinks)
            self._kept.append((_sample(q, k), self.hold(finished)))
        else:
            finished = self._take(q, k) if self._kept else None
        return attend(q, k, v, call, finished, sinks)

    def _take(self, q: Tensor, k: Tensor) -> ForwardResult:
        """The oldest pass that began with these tensors."""
        wanted = _sample(q, k)
        for index, (sample, take) in enumerate(self._kept):
            if all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(sample, wanted, strict=True)):
                del self._kept[index]
                return take()
        raise WallfacerError(
            f"{self._where}: {FLAG}: must be left out here: the queries and keys of a recomputed forward equal those "
            f"of none of the {len(self._kept)} kept ones"
        )

    def check_empty(self) -> None:
        """To be called when a step is over.

        Raises:
            WallfacerError: something was kept that nobody came for.
        """
        if self._kept:
            raise WallfacerError(
                f"{self._where}: {FLAG}: must be left out here: {len(self._kept)} forward passes without gradients "
                "were not recomputed by the end of the step"
            )


def on_device(finished: ForwardResult) -> Callable[[], ForwardResult]:
    """Keep a finished pass where it is."""
    return lambda: finished


def _sample(*tensors: Tensor) -> tuple[Tensor, ...]:
    """A few numbers of each, copied: some rows, all heads, one channel."""
    return tuple(x.detach()[:: max(1, x.shape[0] // SAMPLED_ROWS)].select(-1, 0).clone() for x in tensors)


def _watch(keeper: Keeper) -> None:
    """Have the keeper checked after every step of an optimizer, for as long as it lives."""
    _check_after_steps()
    _keepers.add(keeper)


@cache
def _check_after_steps() -> None:
    register_optimizer_step_post_hook(lambda *_: [keeper.check_empty() for keeper in _keepers])
