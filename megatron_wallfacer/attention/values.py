"""Checks of all arguments of :func:`megatron_wallfacer.attention.attention` except tensors.

Each function raises :class:`megatron_wallfacer.errors.OptionError` for a value that is not allowed.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import pairwise
from math import isfinite
from numbers import Real
from operator import index
from typing import Any

from megatron_wallfacer.errors import OptionError
from megatron_wallfacer.schedule.grid import Grid
from megatron_wallfacer.schedule.mask import NO_LIMIT, SHARD_MODES, Mask, window_mask
from megatron_wallfacer.schedule.plan import Plan

_SHOWN = 60


def shown(value: object) -> str:
    """Return a value as one short line."""
    text = " ".join(repr(value).split())
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def plan_of(value: object) -> Plan:
    """Return ``value`` if it is a plan. If it is a grid, return the grid's plan with default choices."""
    if isinstance(value, Plan):
        return value
    if isinstance(value, Grid):
        return Plan(value)
    raise OptionError("plan", shown(value), "a Grid, or a Plan such as make_plan('ring', 4)")


def check_switch(name: str, value: object) -> None:
    """Check that an argument is True or False."""
    if not isinstance(value, bool):
        raise OptionError(name, shown(value), "True or False")


def check_name(name: str, value: object, names: Collection[str]) -> None:
    """Check that an argument is one of several names."""
    if not isinstance(value, str) or value not in names:
        plain = isinstance(value, str) and value.isprintable() and len(value) <= _SHOWN
        raise OptionError(name, value if plain else shown(value), f"one of {', '.join(names)}")


def scale_of(value: object, head_dim: int) -> float:
    """Return the scale of the scores; ``head_dim ** -0.5`` if the value is None."""
    if value is None:
        return head_dim**-0.5
    number = _number("scale", value, "a positive number, or None for head_dim ** -0.5")
    if number <= 0:
        raise OptionError(
            "scale", value, "positive, because PyTorch's CPU kernel returns NaN for other scales without an error"
        )
    return number


def softcap_of(value: object) -> float:
    """Return the cap of the scores; 0 for no cap."""
    allowed = "a positive number, or 0 for no cap"
    number = _number("softcap", value, allowed)
    if number < 0:
        raise OptionError("softcap", value, allowed)
    return number


def mask_of(causal: bool, window_size: object, cu_seqlens: object, shard_mode: Any, cp_size: int, tokens: int) -> Mask:
    """Return the mask of a call of :func:`attention`. ``tokens`` is the length of the whole sequence."""
    check_switch("causal", causal)
    check_name("shard_mode", shard_mode, SHARD_MODES)
    window = window_mask(_window(window_size), causal)
    documents = None if cu_seqlens is None else _documents(cu_seqlens)
    if documents is None:
        return window
    # Empty documents do not change the mask. If all documents are empty, one boundary remains.
    ends = tuple(dict.fromkeys(documents))
    mask = Mask(window.left, window.right, ends if len(ends) > 1 else None, shard_mode)
    # A document of a wrong length is reported first, because it may cause a wrong length of the sequence.
    mask.check_lengths(cp_size)
    if documents[-1] != tokens:
        raise OptionError(
            "cu_seqlens",
            f"[..., {documents[-1]}]",
            f"a list that ends with {tokens}, the number of tokens on all ranks",
        )
    return mask


def _number(name: str, value: object, allowed: str) -> float:
    if not isinstance(value, Real) or isinstance(value, bool) or not isfinite(value):
        raise OptionError(name, shown(value), allowed)
    return float(value)


def _integers(value: object) -> tuple[int, ...] | None:
    """Return the integers of a sequence, or of a one-dimensional array or tensor; None for other values."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if not isinstance(value, Sequence) or isinstance(value, str | bytes) or any(isinstance(x, bool) for x in value):
        return None
    try:
        return tuple(map(index, value))
    except TypeError:
        return None


def _window(value: object) -> tuple[int, int]:
    sides = _integers(value)
    if sides is None or len(sides) != 2 or min(sides) < NO_LIMIT:
        raise OptionError("window_size", shown(value), "numbers of tokens (left, right), -1 for no limit")
    return sides[0], sides[1]


def _documents(value: object) -> tuple[int, ...]:
    ends = _integers(value)
    if ends is None:
        raise OptionError("cu_seqlens", shown(value), "a sequence of whole numbers, boundaries of documents from 0 on")
    if not ends or ends[0] != 0 or any(after < before for before, after in pairwise(ends)):
        raise OptionError("cu_seqlens", shown(ends), "ascending from 0 to the length of the sequence")
    return ends
