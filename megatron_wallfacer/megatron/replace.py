"""Strict replacement of a name in somebody else's module."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from megatron_wallfacer.errors import WallfacerError


def replace(dotted: str, value: Any) -> None:
    """Bind `dotted` (module, then attributes: 'package.module.Class.name') to `value`.

    Raises:
        WallfacerError: There is no such name: a newer torch or Megatron moved it, and leaving it alone would show
            much later and somewhere else.
    """
    wrap(dotted, lambda _: value)


def wrap(dotted: str, make: Callable[[Any], Any]) -> None:
    """Bind `dotted` to what `make` makes of its present value.

    Raises:
        WallfacerError: As for `replace`.
    """
    owner, name = _owner_of(dotted)
    try:
        present = getattr(owner, name)
    except AttributeError:
        raise _missing(dotted) from None
    setattr(owner, name, make(present))


def _owner_of(dotted: str) -> tuple[Any, str]:
    """The module or class that holds the last name of `dotted`, and that name."""
    *path, name = dotted.split(".")
    owner = importlib.import_module(path[0])
    imported = path[0]
    for part in path[1:]:
        imported = f"{imported}.{part}"
        try:
            owner = importlib.import_module(imported)
        except ModuleNotFoundError as error:
            if error.name != imported and not imported.startswith(f"{error.name}."):
                raise  # the module exists; something that it imports does not
            try:
                owner = getattr(owner, part)
            except AttributeError:
                raise _missing(dotted) from None
    return owner, name


def _missing(dotted: str) -> WallfacerError:
    """The error for a name that is not there."""
    package = dotted.split(".")[0]
    module = importlib.import_module("megatron.core" if package == "megatron" else package)
    who = "Megatron" if package == "megatron" else package
    return WallfacerError(f"{who} {module.__version__} has no {dotted}, which the plugin must replace")
