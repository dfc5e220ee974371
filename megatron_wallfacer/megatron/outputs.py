"""Outputs of a run: printed lines, metrics and files. A failed write of metrics or timelines does not end the run."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from megatron_wallfacer.errors import WallfacerError


def is_first_rank() -> bool:
    """Return whether the environment variable ``RANK`` is 0 or missing."""
    return os.environ.get("RANK", "0") == "0"


def say(line: str) -> None:
    """Print a line on rank 0."""
    if is_first_rank():
        print(f"wallfacer: {line}", flush=True)


class Output:
    """An optional output, such as metrics. After a failed write it prints one warning and is switched off."""

    def __init__(self, name: str) -> None:
        self._name, self.failed = name, False

    def write(self, write: Callable[[], None]) -> None:
        """Call the function ``write``, unless an earlier call raised an exception."""
        if self.failed:
            return
        try:
            write()
        except Exception as error:
            self.failed = True
            cause = getattr(error, "strerror", None) or " ".join(f"{type(error).__name__}: {error}".split())
            print(f"wallfacer: warning: {self._name} is switched off: {cause}", flush=True)


def check_folder(flag: str, folder: Path) -> None:
    """Make the folder that a flag names, and raise a WallfacerError unless files can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise WallfacerError(f"{flag} {folder}: cannot be written: {error.strerror}") from None
