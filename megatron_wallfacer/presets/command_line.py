"""Flags and variables from the command line, in the same form as those of a file."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from megatron_wallfacer.errors import WallfacerError
from megatron_wallfacer.presets import torchrun
from megatron_wallfacer.presets.entry import COMMAND_LINE, Setting


def typed_settings(words: Sequence[str]) -> Iterator[Setting]:
    """``--flag``, ``--flag value ...``, ``--flag=value``; ``--flag=false`` leaves a flag of the file out.

    Raises:
        WallfacerError: the first word is no flag, or one of torchrun's has a wrong value.
    """
    for flag, values in _grouped(words):
        name, equals, value = flag.partition("=")
        given = ((value,) if equals else ()) + tuple(values)
        setting = Setting(name, None if flag == f"{name}=false" else given, COMMAND_LINE)
        if name in torchrun.FLAGS:
            if setting.words is None or len(setting.words) != 1:
                raise WallfacerError(f"{name}: must have one value")
            torchrun.check_torchrun(setting)
        yield setting


def typed_variables(assignments: Iterable[str]) -> Iterator[Setting]:
    """``NAME=VALUE``.

    Raises:
        WallfacerError: one is not of this form.
    """
    for assignment in assignments:
        name, equals, value = assignment.partition("=")
        if not equals or not name.isidentifier():
            raise WallfacerError(f"--env {assignment}: must be NAME=VALUE")
        yield Setting(name, (value,), COMMAND_LINE)


def _grouped(words: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """Each flag with the words up to the next."""
    group: list[str] = []
    for word in words:
        if word.startswith("--"):
            if group:
                yield group[0], group[1:]
            group = [word]
        elif group:
            group.append(word)
        else:
            raise WallfacerError(f"{word}: is no flag; only Megatron's flags follow CONFIG")
    if group:
        yield group[0], group[1:]
