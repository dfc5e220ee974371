"""Every message of the errors that a user is meant to read, read off the places that make them.

What is filled in at run time is shown as ``...``: ``f"{path}: is not UTF-8"`` is ``...: is not UTF-8``.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "megatron_wallfacer"
BLANK = "..."


@cache
def messages() -> dict[str, str]:
    """Message by message, the place that makes it."""
    trees = {path: ast.parse(path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))}
    errors = {"WallfacerError"} | set(_subclasses(trees.values()))
    found: dict[str, str] = {}
    for path, tree in trees.items():
        constants = _constants(tree)
        for call in ast.walk(tree):
            message = _message(call, errors, constants) if isinstance(call, ast.Call) else ""
            if message and not _passes_on(message):
                found.setdefault(message, f"{path.relative_to(PACKAGE)}:{call.lineno}")
    return found


def _subclasses(trees: Iterable[ast.Module]) -> Iterator[str]:
    """Names of the errors that derive from ours."""
    for node in (node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ClassDef)):
        if any(isinstance(base, ast.Name) and base.id == "WallfacerError" for base in node.bases):
            yield node.name


def _passes_on(message: str) -> bool:
    """Whether it is another message behind a flag or a place: nothing of its own but ``must be``."""
    own = re.sub(r"^(?:--\S+|layer|\.\.\.)(?: \.\.\.)?: ", "", message)
    return not set(re.findall(r"[A-Za-z]+", own)) - {"must", "be"}


def _constants(tree: ast.Module) -> dict[str, str]:
    """Strings that a module has by a name."""
    found = {"PREFIX": "--wallfacer-"}
    for node in (node for node in tree.body if isinstance(node, ast.Assign)):
        is_text = isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        if (is_text or isinstance(node.value, ast.Call)) and (text := _text(node.value, {})) != BLANK:
            found |= {target.id: text for target in node.targets if isinstance(target, ast.Name)}
    return found


def _message(call: ast.Call, errors: set[str], constants: dict[str, str]) -> str:
    """The message that a call makes, empty if it makes none."""
    parts = [_text(argument, constants) for argument in call.args]
    name = call.func.id if isinstance(call.func, ast.Name) else None
    if name == "OptionError":
        option, value, allowed = parts
        message = f"{option}={value}: must be {allowed}"
    elif name in errors:
        message = parts[0]
    elif isinstance(call.func, ast.Attribute) and call.func.attr == "fail":
        # Of a preset's file: the place, then the text.
        message = f"{BLANK}: {parts[1]}"
    else:
        return ""
    # What is filled in next to each other is one gap.
    return re.sub(r"(?:\.\.\. ?)*\.\.\.", BLANK, " ".join(message.split()))


def _text(node: ast.expr, constants: dict[str, str]) -> str:
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(value, constants) for value in node.values)
    if isinstance(node, ast.FormattedValue):
        return _text(node.value, constants)
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.Name):
        return constants.get(node.id, BLANK)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "flag_name":
        (option,) = node.args
        return "--wallfacer-" + _text(option, constants).replace("_", "-")
    return BLANK
