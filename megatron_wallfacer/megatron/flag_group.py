"""Build command-line flags from a dataclass with one field per flag, like Megatron's ``ArgumentGroupFactory``.

The docstring of a field is the help text of its flag, and the metadata ``argparse_meta`` has arguments of
``add_argument``. This module does not use ``ArgumentGroupFactory``, which only recent Megatron releases have and which
supports neither a prefix nor a minimum release per flag. Metadata of a field, all optional but ``since``:

* ``since``: oldest release of Megatron with which the flag works.
* ``values``: names that the flag accepts.
* ``unset``: effect of leaving the flag out if the default is None.
* ``see``: section of the documentation.
"""

from __future__ import annotations

import argparse
import ast
import inspect
from collections.abc import Callable, Sequence
from dataclasses import Field, dataclass, fields
from itertools import pairwise
from typing import Any, get_args, get_type_hints

from megatron_wallfacer.errors import WallfacerError


@dataclass(frozen=True)
class FlagSpec:
    """Description of one flag for the parser and for the table of flags.

    Attributes:
        field: name of the dataclass field.
        name: flag as typed on the command line.
        dest: attribute of the parsed arguments that has the flag's value.
        default: value if the flag is left out.
        argparse_meta: arguments of ``add_argument``.
        convert: function that converts text to a value; None for a switch. For a wrong text the function raises a
            ValueError with the allowed values.
        summary: sentence about the effect of the flag.
        details: further sentences, for the table only.
        values: names that the flag accepts, or empty if the flag accepts numbers, paths or any name.
        unset: effect of leaving the flag out.
        since: oldest release of Megatron with which the flag works.
        see: section of the documentation, or empty.
    """

    field: str
    name: str
    dest: str
    default: Any
    argparse_meta: dict[str, Any]
    convert: Callable[[str], Any] | None
    summary: str
    details: str
    values: tuple[str, ...]
    unset: str
    since: tuple[int, int]
    see: str

    @property
    def help(self) -> str:
        """Return the text for ``--help``: effect, values and default."""
        values = f": {', '.join(self.values)}" if self.values else ""
        default = "off" if self.convert is None else self.unset or self.default
        text = f"{self.summary.removesuffix('.')}{values} (default: {default})"
        return text.replace("``", "").replace("%", "%%")

    def typed(self, value: object) -> str:
        """Return the flag and a value in the form of the command line."""
        return self.name if self.convert is None else f"{self.name} {value}"


def flag_specs(config: type, prefix: str) -> tuple[FlagSpec, ...]:
    """Return the flags of a dataclass, in the order of its fields.

    Args:
        config: dataclass with a docstring under each field.
        prefix: first characters of every flag, such as ``--wallfacer-``.
    """
    docstrings, types = field_docstrings(config), get_type_hints(config)
    return tuple(_spec(field, docstrings[field.name], types[field.name], prefix) for field in fields(config))


def add_flags(parser: argparse.ArgumentParser, specs: Sequence[FlagSpec], title: str, description: str) -> None:
    """Add an argument group with flags to a parser.

    An invalid value raises a one-line WallfacerError. An error of argparse would print Megatron's complete usage.
    """
    group = parser.add_argument_group(title, description)
    for spec in specs:
        kind = {"action": "store_true"} if spec.convert is None else {"action": _Convert, "convert": spec.convert}
        group.add_argument(
            spec.name, dest=spec.dest, default=spec.default, help=spec.help, **kind, **spec.argparse_meta
        )


def attribute_of(flag: str) -> str:
    """Return the name that argparse derives from a flag, for the attribute of the parsed arguments."""
    return flag.removeprefix("--").replace("-", "_")


def whole_number(text: str) -> int:
    """Return the integer that a text contains.

    Raises:
        ValueError: The text is not an integer. The message of the error describes the allowed values.
    """
    try:
        return int(text)
    except ValueError:
        raise ValueError("a whole number") from None


def field_docstrings(config: type) -> dict[str, str]:
    """Return the docstring of each field of a class, which is the string after the field."""
    (tree,) = ast.parse(inspect.getsource(config)).body
    assert isinstance(tree, ast.ClassDef)
    return {
        field.target.id: inspect.cleandoc(text.value.value)
        for field, text in pairwise(tree.body)
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(text, ast.Expr)
        and isinstance(text.value, ast.Constant)
    }


def _spec(field: Field, docstring: str, kind: Any, prefix: str) -> FlagSpec:
    name = prefix + field.name.replace("_", "-")
    summary, _, details = docstring.partition("\n\n")
    argparse_meta = dict(field.metadata.get("argparse_meta", {}))
    convert = argparse_meta.pop("type", whole_number if int in (kind, *get_args(kind)) else str)
    return FlagSpec(
        field=field.name,
        name=name,
        dest=attribute_of(name),
        default=field.default,
        argparse_meta=argparse_meta,
        convert=None if kind is bool else convert,
        summary=" ".join(summary.split()),
        details=" ".join(details.split()),
        values=tuple(field.metadata.get("values", ())),
        unset=field.metadata.get("unset", ""),
        since=field.metadata["since"],
        see=field.metadata.get("see", ""),
    )


class _Convert(argparse.Action):
    """An argparse action that converts a value. Unlike argparse's ``type``, an action can raise its own error class."""

    def __init__(self, *, convert: Callable[[str], Any], **options: Any) -> None:
        super().__init__(**options)
        self._convert = convert

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, text: Any, *_: Any) -> None:
        try:
            setattr(namespace, self.dest, self._convert(text))
        except ValueError as error:
            raise WallfacerError(f"{self.option_strings[0]} {text}: must be {error}") from None
