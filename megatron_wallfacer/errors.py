"""The exceptions of this project. Their messages are written for users."""

from __future__ import annotations

from collections.abc import Sequence


class WallfacerError(ValueError):
    """A request that cannot be met. The message is one line: what was asked, what was found, what is possible."""


class OptionError(WallfacerError):
    """One option has a value that is not allowed.

    Args:
        option: name as in the Python API, e.g. ``team_size``; on a command line it is ``--wallfacer-team-size``.
        value: what was given.
        allowed: what is allowed, as a phrase.
    """

    def __init__(self, option: str, value: object, allowed: str) -> None:
        super().__init__(f"{option}={value}: must be {allowed}")
        self.option, self.value, self.allowed = option, value, allowed


class DisagreementError(WallfacerError):
    """Ranks that must have the same settings have different ones. The one error of several lines: one per setting.

    Args:
        lines: one for each setting.
    """

    def __init__(self, lines: Sequence[str]) -> None:
        super().__init__("\n".join(lines))
        self.lines = tuple(lines)
