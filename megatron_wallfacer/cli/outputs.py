"""Files that commands write: checked before a command does its work."""

from __future__ import annotations

import os
from pathlib import Path

from megatron_wallfacer.errors import WallfacerError


def check_output(flag: str, path: Path | None) -> None:
    """Check that a file can be written: make its folder, open it, change nothing in it.

    Args:
        flag: that names the file.
        path: of the file, which may exist; None where the command writes none.

    Raises:
        WallfacerError: it cannot be written.
    """
    if path is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        is_new = not path.exists()
        # Opening a pipe would wait for its other end.
        os.close(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK, 0o666))
        if is_new:
            path.unlink()
    except OSError as error:
        raise WallfacerError(f"{flag} {path}: cannot be written: {error.strerror}") from None
    except ValueError as error:  # a NUL in the name
        raise WallfacerError(f"{flag} {str(path)!r}: cannot be written: {error}") from None
