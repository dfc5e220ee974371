"""Replace a name in a module of another project, and raise an error if the name does not exist."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from megatron_wallfacer.errors import WallfacerError


def replace(dotted: str, value: Any) -> None:
    """Bind `dotted` to `value`.

    Args:
        dotted: module followed by attributes, such as 'package.module.Class.name'.
        value: new value of the attribute.

    Raises:
        WallfacerError: The name does not exist, for example in a newer release of torch or Megatron.
    """
    wrap(dotted, lambda _: value)


def wrap(dotted: str, make: Callable[[Any], Any]) -> None:
    """Bind `dotted` to the value that `make` returns for the present value.

    Raises:
        WallfacerError: The name does not exist.
    """
    owner, name = _owner_of(dotted)
    try:
        present = getattr(owner, name)
    except AttributeError:
        raise _missing(dotted) from None
    setattr(owner, name, make(present))


def _owner_of(dotted: str) -> tuple[Any, str]:
    """Return the module or class that has the last name of `dotted`, and the name."""
    *path, name = dotted.split(".")
    owner = importlib.import_module(path[0])
    imported = path[0]
    for part in path[1:]:
        imported = f"{imported}.{part}"
        try:
            owner = importlib.import_module(imported)
        except ModuleNotFoundError as error:
            if error.name != imported and not imported.startswith(f"{error.name}."):
                raise  # the module exists, but one of its imports does not
            try:
                owner = getattr(owner, part)
            except AttributeError:
                raise _missing(dotted) from None
    return owner, name


def _missing(dotted: str) -> WallfacerError:
    package = dotted.split(".")[0]
    module = importlib.import_module("megatron.core" if package == "megatron" else package)
    who = "Megatron" if package == "megatron" else package
    return WallfacerError(f"{who} {module.__version__} has no {dotted}, which the plugin must replace")
