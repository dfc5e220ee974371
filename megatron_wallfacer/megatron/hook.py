"""Replace one function or class attribute of Megatron after checking it, and undo the replacement."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache, partial, wraps
from typing import TYPE_CHECKING, Any

from megatron_wallfacer.errors import WallfacerError
from megatron_wallfacer.megatron.releases import SUPPORTED, UNTIL, Number, version_text
from megatron_wallfacer.megatron.replace import owner_of
from megatron_wallfacer.megatron.version import Version, untested_allowed

if TYPE_CHECKING:
    from megatron_wallfacer.megatron.plugin_state import PluginState

_signature = cache(inspect.signature)


def bound(function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> inspect.BoundArguments:
    """Return the arguments of a call, keyed by parameter name."""
    return _signature(function).bind(*args, **kwargs)


@dataclass
class Hook:
    """Replacement of ``target`` by a function that calls ``run(original, *args, **kwargs)``.

    Attributes:
        run: function that replaces the target. Its arguments are the plugin's state (from :meth:`bind`), the original
            function and the arguments of the call.
        name: name of the hook in messages.
        purpose: phrase that describes the effect of the hook.
        target: dotted path, ``package.module:attribute`` or ``package.module:Class.attribute``.
        since: first supported Megatron release, (major, minor).
        parameters: parameters that the signature of the target must have, because the replacement uses them.
        until: first Megatron release that is too new.
    """

    run: Callable[..., Any]
    name: str
    purpose: str
    target: str
    since: Number
    parameters: tuple[str, ...] = ()
    until: Number = UNTIL
    _original: Any = field(default=None, init=False, repr=False)
    _replacement: Any = field(default=None, init=False, repr=False)

    def bind(self, state: PluginState) -> Hook:
        """Return a copy of this hook whose ``run`` gets ``state`` as its first argument. The copy is not installed."""
        return replace(self, run=partial(self.run, state))

    def fits(self, version: Version) -> bool:
        """Return whether the hook supports a Megatron version."""
        return self.since <= version[:2] < self.until

    def find(self, version: Version) -> tuple[Any, str]:
        """Check the target, and return (module or class, attribute name) of the target.

        Raises:
            WallfacerError: The hook does not support the version, or the target is missing or lacks a parameter.
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
        """Install the hook unless it is installed already. This method raises the errors of :meth:`find`."""
        if self._replacement is not None:
            return
        owner, attribute = self.find(version)
        original = getattr(owner, attribute)

        # Keep the signature, because other hooks and patches inspect it.
        @wraps(original)
        def replacement(*args: Any, **kwargs: Any) -> Any:
            return self.run(original, *args, **kwargs)

        self._original, self._replacement = original, replacement
        setattr(owner, attribute, replacement)

    def verify(self, version: Version) -> None:
        """Raise a WallfacerError if another patch has replaced the target since the hook was installed."""
        owner, attribute = self._owner(version)
        if self._replacement is None or getattr(owner, attribute) is not self._replacement:
            raise self._unfit(version, "no longer belongs to the plugin: another patch has replaced it")

    def undo(self, version: Version) -> None:
        """Restore Megatron's original function or class attribute."""
        if self._replacement is None:
            return
        owner, attribute = self._owner(version)
        setattr(owner, attribute, self._original)
        self._original = self._replacement = None

    def _owner(self, version: Version) -> tuple[Any, str]:
        owned = owner_of(self.target)
        if owned is None:
            raise self._unfit(version, "does not exist")
        return owned

    def _unfit(self, version: Version, what: str) -> WallfacerError:
        return WallfacerError(
            f"hook '{self.name}': megatron-core {version_text(version)}: {self.target} {what}; "
            f"use {SUPPORTED}, or a newer megatron-wallfacer"
        )
