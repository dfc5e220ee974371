"""What a run writes beside its checkpoints: observability never ends a run."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

from megatron_wallfacer.errors import WallfacerError


class Output:
    """An output that is switched off, with one warning, when it first fails.

    Args:
        name: flag of the output, with its value.
    """

    def __init__(self, name: str) -> None:
        self._name, self.failed = name, False

    def write(self, write: Callable[[], None]) -> None:
        """Call a function that writes, unless an earlier one failed. A library may raise what it likes."""
        if self.failed:
            return
        try:
            write()
        except Exception as error:
            self.failed = True
            cause = getattr(error, "strerror", None) or " ".join(f"{type(error).__name__}: {error}".split())
            print(f"wallfacer: warning: {self._name} is switched off: {cause}", flush=True)


def check_folder(flag: str, folder: Path) -> None:
    """Make a folder, and try to write there.

    Args:
        flag: that names the folder.
        folder: for files of every rank of this host.

    Raises:
        WallfacerError: it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise WallfacerError(f"{flag} {folder}: cannot be written: {error.strerror}") from None
