"""``--wallfacer-keep-on-host`` and ``--wallfacer-layer-inputs-on-host``: their values."""

from __future__ import annotations

import argparse
from typing import Literal

from megatron_wallfacer.errors import WallfacerError

KEEP, INPUTS = "--wallfacer-keep-on-host", "--wallfacer-layer-inputs-on-host"
#: Part of the layers; ``auto``: as many as host memory has room for.
Fraction = float | Literal["auto"]


def fraction_of(args: argparse.Namespace, flag: str) -> Fraction | None:
    """Return the value of a flag, None if it is not given.

    Args:
        args: parsed arguments.
        flag: :data:`KEEP` or :data:`INPUTS`.

    Raises:
        WallfacerError: The value is neither ``auto`` nor a number above 0 and at most 1.
    """
    text = getattr(args, flag.removeprefix("--").replace("-", "_"), None)
    if text is None or text == "auto":
        return text
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise WallfacerError(f"{flag} {text}: must be auto, or a part of the layers above 0 and at most 1")
    return value
