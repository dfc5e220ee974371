"""One row of docs/reliability.md."""

from __future__ import annotations

from dataclasses import dataclass

NOTHING = "nothing: no training step was run"
SINCE_CHECKPOINT = "steps since the last checkpoint"
#: In the place of tests: the fault needs hardware that the tests do not have.
NOT_TRIED = ()


@dataclass(frozen=True)
class Row:
    """One fault.

    Attributes:
        fault: what goes wrong.
        happens: what the job does.
        noticed: time until the message.
        variable: variable or flag that shortens this time; ``-`` for none.
        message: beginning of the message, or what it names.
        lost: training that has to be repeated.
        tests: pytest node ids that check the row; :data:`NOT_TRIED` where nothing does.
    """

    fault: str
    happens: str
    noticed: str
    variable: str
    message: str
    lost: str
    tests: tuple[str, ...]
