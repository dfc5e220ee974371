"""Library functions whose signatures are read once, and whose arguments are bound by keyword.

Releases of a library rename, add and drop parameters. If a release lacks a parameter, an :class:`OptionalArgument` is
left out, because the result is the same without it. For all other arguments an error is raised.

:class:`UnavailableError` is raised if a function is missing, if its parameters cannot be read, or if a call does not
fit its signature.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

import torch

from megatron_wallfacer.kernels.optional import Library, UnavailableError

_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


@dataclass(frozen=True)
class OptionalArgument:
    """An argument that is omitted if the release lacks the parameter. The omission must not change the result."""

    value: Any


@dataclass(frozen=True)
class Signature:
    """Parameters of a library function.

    Attributes:
        owner: name and version of the library, for messages.
        required: names of the parameters without a default.
        needs: supported releases, as error messages print them.
    """

    owner: str
    function: str
    names: frozenset[str]
    required: frozenset[str]
    needs: str

    @classmethod
    def of(cls, function: Callable[..., Any], *, name: str, owner: str, needs: str) -> Signature:
        """Return the signature of a Python function or of a torch operator."""
        schema = _schema(function)
        if schema is not None:
            has_default = {argument.name: argument.has_default_value() for argument in schema.arguments}
        else:
            parameters = inspect.signature(function).parameters.values()
            if any(parameter.kind in _VARIADIC for parameter in parameters):
                raise UnavailableError(
                    f"{owner}: {name} takes *args or **kwargs, so the plugin cannot check its parameters"
                )
            has_default = {parameter.name: parameter.default is not parameter.empty for parameter in parameters}
        required = frozenset(name for name, has in has_default.items() if not has)
        return cls(owner, name, frozenset(has_default), required, needs)

    def arguments(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return keyword arguments for the library function.

        An :class:`OptionalArgument` is left out if the function has no such parameter.
        """
        missing = [
            name for name, value in values.items() if name not in self.names and not isinstance(value, OptionalArgument)
        ]
        if missing:
            raise UnavailableError(f"{self.owner}: {self.function} has no {', '.join(missing)}; needs {self.needs}")
        unknown = sorted(self.required - set(values))
        if unknown:
            raise UnavailableError(
                f"{self.owner}: {self.function} requires {', '.join(unknown)}, which the plugin does not pass; "
                f"needs {self.needs}"
            )
        given = {name: value for name, value in values.items() if name in self.names}
        return {name: value.value if isinstance(value, OptionalArgument) else value for name, value in given.items()}


def _schema(function: Callable[..., Any]) -> torch.FunctionSchema | None:
    # The Python signature of a torch operator does not show its parameters.
    if isinstance(function, torch.library.CustomOpDef):
        function = function._opoverload
    if isinstance(function, torch._ops.OpOverloadPacket):
        function = function.default
    return function._schema if isinstance(function, torch._ops.OpOverload) else None


class LibraryFunction:
    """A library function whose signature is read once. A prepared call has all arguments except the tensors.

    ``function`` is None if the library does not have the function. ``tensors`` are the parameters that each call passes
    by keyword. For ``owner`` and ``needs`` see :class:`Signature`.
    """

    def __init__(
        self, function: Callable[..., Any] | None, *, name: str, tensors: Iterable[str], owner: str, needs: str
    ) -> None:
        if function is None:
            raise UnavailableError(f"{owner}: there is no {name}; needs {needs}")
        self._function, self._tensors = function, dict.fromkeys(tensors)
        self.signature = Signature.of(function, name=name, owner=owner, needs=needs)

    def has(self, name: str) -> bool:
        """Return whether the function has a parameter of this name."""
        return name in self.signature.names

    def bind(self, values: Mapping[str, Any]) -> Callable[..., Any]:
        """Return the function with all arguments bound except the tensors; see :meth:`Signature.arguments`."""
        arguments = self.signature.arguments(self._tensors | dict(values))
        return partial(self._function, **{name: arguments[name] for name in arguments if name not in self._tensors})


class LoadedLibrary:
    """The functions of one release of an optional library. The library is imported unless ``module`` is given.

    ``title`` (name and version of the library) and ``needs`` (supported releases) are parts of error messages.

    Raises:
        UnavailableError: The library is not installed.
    """

    def __init__(self, library: Library, needs: str, module: ModuleType | None, title: str | None) -> None:
        self.module, self.title, self.needs = module or library.load(), title or library.title, needs

    def function(self, name: str, tensors: Iterable[str]) -> LibraryFunction:
        """Return a function of the library; see :class:`LibraryFunction`."""
        function = getattr(self.module, name, None)
        return LibraryFunction(function, name=name, tensors=tensors, owner=self.title, needs=self.needs)
