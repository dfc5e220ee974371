"""Convert flags and variables that the user types after CONFIG to preset entries."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise

from megatron_wallfacer.errors import WallfacerError
from megatron_wallfacer.presets import torchrun
from megatron_wallfacer.presets.entry import COMMAND_LINE, PresetEntry


def flag_entries(arguments: Sequence[str]) -> Iterator[PresetEntry]:
    """Yield the entries of ``--flag``, ``--flag value ...`` and ``--flag=value``.

    ``--flag=false`` removes a flag of the file.

    Raises:
        WallfacerError: The first argument is not a flag, or a torchrun flag has an invalid value.
    """
    for flag, following in _grouped(arguments):
        name, equals, value = flag.partition("=")
        values = ((value,) if equals else ()) + tuple(following)
        entry = PresetEntry(name, None if flag == f"{name}=false" else values, COMMAND_LINE)
        if name in torchrun.FLAGS:
            if entry.values is None or len(entry.values) != 1:
                raise WallfacerError(f"{name}: must have one value")
            torchrun.check_torchrun(entry)
        yield entry


def variable_entries(assignments: Iterable[str]) -> Iterator[PresetEntry]:
    """Yield the entries of ``--env NAME=VALUE``.

    Raises:
        WallfacerError: An assignment does not have the form NAME=VALUE.
    """
    for assignment in assignments:
        name, equals, value = assignment.partition("=")
        if not equals or not name.isidentifier():
            raise WallfacerError(f"--env {assignment}: must be NAME=VALUE")
        yield PresetEntry(name, (value,), COMMAND_LINE)


def _grouped(arguments: Sequence[str]) -> Iterator[tuple[str, Sequence[str]]]:
    """Yield each flag with the arguments up to the next flag."""
    starts = [index for index, argument in enumerate(arguments) if argument.startswith("--")]
    if arguments and starts[:1] != [0]:
        raise WallfacerError(f"{arguments[0]}: must be a flag; only Megatron's flags follow CONFIG")
    for start, end in pairwise([*starts, len(arguments)]):
        yield arguments[start], arguments[start + 1 : end]
