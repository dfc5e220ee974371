"""Replace a name in a module of another project, and raise an error if the name does not exist."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from megatron_wallfacer.errors import WallfacerError


def replace(target: str, value: Any) -> None:
    """Set the attribute with the path ``target`` to ``value``.

    Args:
        target: ``package.module:attribute`` or ``package.module:Class.attribute``.
        value: new value of the attribute.

    Raises:
        WallfacerError: The name does not exist, for example in a newer release of torch or Megatron.
    """
    wrap(target, lambda _: value)


def wrap(target: str, make: Callable[[Any], Any]) -> None:
    """Replace the value of a name by the result of ``make``, which gets the old value. See :func:`replace`."""
    owned = owner_of(target)
    if owned is None:
        name = target.replace(":", ".")
        package = name.split(".")[0]
        module = importlib.import_module("megatron.core" if package == "megatron" else package)
        who = "Megatron" if package == "megatron" else package
        raise WallfacerError(
            f"{who} {module.__version__} has no {name}, which the plugin replaces: use a supported release"
        )
    owner, attribute = owned
    setattr(owner, attribute, make(getattr(owner, attribute)))


def owner_of(target: str) -> tuple[Any, str] | None:
    """Return (module or class, attribute name) of a target, or None if the target does not exist."""
    module, _, path = target.partition(":")
    *classes, attribute = path.split(".")
    try:
        owner = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise  # the module exists, but one of its imports does not
        return None
    for name in classes:
        owner = getattr(owner, name, None)
    return (owner, attribute) if hasattr(owner, attribute) else None
