"""Check that a command can write its output files before the command starts its work."""

from __future__ import annotations

import os
from pathlib import Path

from megatron_wallfacer.errors import WallfacerError


def check_output(flag: str, path: Path | None) -> None:
    """Check that the file of a flag can be written, without changing its content. The function creates the folder.

    A ``path`` of None means that the command writes no file.

    Raises:
        WallfacerError: The file cannot be written.
    """
    if path is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        is_new = not path.exists()
        # Without O_NONBLOCK, opening a pipe would wait for a reader of the pipe.
        os.close(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK, 0o666))
        if is_new:
            path.unlink()
    except OSError as error:
        raise WallfacerError(f"{flag} {path}: cannot be written: {error.strerror}") from None
    except ValueError as error:  # a NUL in the name
        raise WallfacerError(f"{flag} {str(path)!r}: cannot be written: {error}") from None
