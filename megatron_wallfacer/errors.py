"""The exceptions of this project, whose messages are written for users."""

from __future__ import annotations

from collections.abc import Sequence


class WallfacerError(ValueError):
    """An error in the user's input. The message is one line with the given value and the allowed values."""


class OptionError(WallfacerError):
    """An error of one option: its value is not allowed.

    Args:
        option: name in the Python API, such as ``team_size`` for ``--wallfacer-team-size``.
        value: given value.
        allowed: allowed values, as a phrase.
    """

    def __init__(self, option: str, value: object, allowed: str) -> None:
        super().__init__(f"{option}={value}: must be {allowed}")
        self.option, self.value, self.allowed = option, value, allowed


class DisagreementError(WallfacerError):
    """An error of settings that must be equal on all ranks but differ. The message has one line per setting."""

    def __init__(self, lines: Sequence[str]) -> None:
        super().__init__("\n".join(lines))
        self.lines = tuple(lines)
