"""``--wallfacer-loss-tiles`` and ``--wallfacer-mlp-tiles``: their values, read from Megatron's arguments."""

from __future__ import annotations

import argparse

from megatron_wallfacer.errors import WallfacerError

LOSS, MLP = "--wallfacer-loss-tiles", "--wallfacer-mlp-tiles"
#: In place of a number: :mod:`megatron_wallfacer.megatron.auto_tiles` chooses it.
AUTO = "auto"


def text_of(args: argparse.Namespace, flag: str) -> str | None:
    """Return the value of a flag as it was typed, None if it is not given.

    Args:
        args: parsed arguments.
        flag: :data:`LOSS` or :data:`MLP`.

    Raises:
        WallfacerError: The value is neither a positive whole number nor :data:`AUTO`.
    """
    text = getattr(args, _attribute(flag), None)
    if text is not None and text != AUTO and (not str(text).isdecimal() or int(text) < 1):
        raise WallfacerError(f"{flag} {text}: must be a positive whole number of tiles, or {AUTO}")
    return text


def tiles_of(args: argparse.Namespace, flag: str) -> int | None:
    """Return the number of tiles of a flag, None if it is not given or :data:`AUTO`.

    Raises:
        WallfacerError: as :func:`text_of`.
    """
    text = text_of(args, flag)
    return None if text is None or text == AUTO else int(text)


def _attribute(flag: str) -> str:
    return flag.removeprefix("--").replace("-", "_")
