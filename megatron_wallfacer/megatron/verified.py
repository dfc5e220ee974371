"""Select the training steps in which messages are verified: ``--wallfacer-verify-every``."""

from __future__ import annotations

from torch.optim.optimizer import register_optimizer_step_post_hook


class VerifiedSteps:
    """Counter of training steps. A step ends at the optimizer's first ``step`` after attention.

    With ``every`` = N, the steps N, 2N, 3N, ... of this process are verified.
    """

    def __init__(self, every: int) -> None:
        self._every, self._step, self._busy = every, 1, False
        register_optimizer_step_post_hook(lambda *_: self._stepped())

    def due(self) -> bool:
        """Return whether messages in this step must be verified. Only attention in training may call this method."""
        self._busy = True
        return self._step % self._every == 0

    def _stepped(self) -> None:
        if self._busy:
            self._busy, self._step = False, self._step + 1
