"""Which training steps are verified: what ``--wallfacer-verify-every`` decides."""

from __future__ import annotations

import argparse

from torch.optim.optimizer import register_optimizer_step_post_hook

from megatron_wallfacer.errors import WallfacerError

VERIFY = "--wallfacer-verify-every"


def verify_every_of(args: argparse.Namespace) -> int | None:
    """Return the steps from one verified step to the next, None for no verification.

    Args:
        args: Megatron's, with our numbers read.

    Raises:
        WallfacerError: the value is not positive.
    """
    every = args.wallfacer_verify_every
    if every is not None and every < 1:
        raise WallfacerError(f"{VERIFY} {every}: must be a positive number of steps")
    return every


class VerifiedSteps:
    """Counts training steps. A step ends when an optimizer first steps after some attention.

    Args:
        every: N; steps N, 2N, 3N of this process are verified.
    """

    def __init__(self, every: int) -> None:
        self._every, self._step, self._busy = every, 1, False
        register_optimizer_step_post_hook(lambda *_: self._stepped())

    def due(self) -> bool:
        """Return whether the present step is verified. To be called with attention in training only."""
        self._busy = True
        return self._step % self._every == 0

    def _stepped(self) -> None:
        if self._busy:
            self._busy, self._step = False, self._step + 1
