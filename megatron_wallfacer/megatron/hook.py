"""A hook: one name in Megatron, replaced strictly, checked, and put back."""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from megatron_wallfacer.errors import WallfacerError
from megatron_wallfacer.megatron.releases import SUPPORTED, UNTIL, Number, version_text
from megatron_wallfacer.megatron.version import Version, untested_allowed


@dataclass
class Hook:
    """Replaces ``target`` by ``wrap(original)``.

    Attributes:
        name: what it is called in messages.
        purpose: what it is for, as a phrase.
        target: dotted path, ``package.module:attribute`` or ``package.module:Class.attribute``.
        since: first release (major, minor) that it is written for.
        parameters: names that the target's signature must have, because the replacement relies on them.
        wrap: makes the replacement from the original.
        until: first release that it is no longer written for.
    """

    name: str
    purpose: str
    target: str
    since: Number
    parameters: tuple[str, ...]
    wrap: Callable[[Any], Any]
    until: Number = UNTIL
    _original: Any = field(default=None, init=False, repr=False)
    _replacement: Any = field(default=None, init=False, repr=False)

    def fits(self, version: Version) -> bool:
        """Whether it is written for this version."""
        return self.since <= version[:2] < self.until

    def find(self, version: Version) -> tuple[Any, str]:
        """The module or class that holds the target, and its name in there, once it is seen to be what is expected.

        Raises:
            WallfacerError: it is not written for this version, or the target is missing or has changed.
        """
        if not self.fits(version) and not untested_allowed():
            known = f"{version_text(self.since)} to before {version_text(self.until)}"
            raise self._unfit(version, f"is known from {known} only")
        owner, attribute = self._owner(version)
        parameters = inspect.signature(getattr(owner, attribute)).parameters
        missing = [name for name in self.parameters if name not in parameters]
        if missing:
            raise self._unfit(version, f"has no parameter {', '.join(missing)}")
        return owner, attribute

    def apply(self, version: Version) -> None:
        """Install it; nothing happens where it is installed already.

        Raises:
            WallfacerError: it is not written for this version, or the target is missing or has changed.
        """
        if self._replacement is not None:
            return
        owner, attribute = self.find(version)
        original = getattr(owner, attribute)
        # Looks like the original to whoever inspects it, ourselves included.
        self._original, self._replacement = original, functools.update_wrapper(self.wrap(original), original)
        setattr(owner, attribute, self._replacement)

    def verify(self, version: Version) -> None:
        """Check that Megatron still sees the replacement.

        Raises:
            WallfacerError: somebody replaced it again.
        """
        owner, attribute = self._owner(version)
        if self._replacement is None or getattr(owner, attribute) is not self._replacement:
            raise self._unfit(version, "is not the plugin's any more: another patch has replaced it")

    def undo(self, version: Version) -> None:
        """Put the original back."""
        if self._replacement is None:
            return
        owner, attribute = self._owner(version)
        setattr(owner, attribute, self._original)
        self._original = self._replacement = None

    def _owner(self, version: Version) -> tuple[Any, str]:
        """The module or class that holds the attribute, every step of the way looked up strictly."""
        module, _, path = self.target.partition(":")
        *classes, attribute = path.split(".")
        try:
            owner = importlib.import_module(module)
        except ModuleNotFoundError as error:
            # Only the target's own absence is ours to explain; a missing dependency of it explains itself.
            if error.name is None or not module.startswith(error.name):
                raise
            raise self._unfit(version, "does not exist") from error
        for name in classes:
            owner = getattr(owner, name, None)
        if owner is None or not hasattr(owner, attribute):
            raise self._unfit(version, "does not exist")
        return owner, attribute

    def _unfit(self, version: Version, what: str) -> WallfacerError:
        return WallfacerError(
            f"hook '{self.name}': megatron-core {version_text(version)}: {self.target} {what}; "
            f"use {SUPPORTED}, or a newer megatron-wallfacer"
        )
