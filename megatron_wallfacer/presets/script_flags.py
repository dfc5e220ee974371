"""Flags that a Megatron script adds to Megatron's parser (``extra_args_provider``), read from its source."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path


def flags_of_script(script: Path) -> frozenset[str] | None:
    """Return the flags that a script, or a module that it imports, names in a call of ``add_argument``.

    Nothing is run. Modules in the script's folder are followed further; of others, such as Megatron's, only those
    that the script itself imports are read.

    Args:
        script: path of the script.

    Returns:
        The flags; None where a call in the script's folder makes names while it runs: any flag may then be good.
    """
    flags: set[str] = set()
    folder, read, waiting = script.resolve().parent, set[Path](), [script.resolve()]
    while waiting:
        file = waiting.pop()
        if file in read:
            continue
        read.add(file)
        try:
            tree = ast.parse(file.read_bytes())
        except (OSError, SyntaxError, ValueError):
            continue
        added = list(_added(tree))
        flags.update(filter(None, added))
        if file.parent == folder:
            if None in added:
                return None
            waiting += _imported(tree, folder)
    return frozenset(flags)


def _added(tree: ast.AST) -> Iterator[str | None]:
    """Names in calls of ``add_argument``; None for one that is no literal."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "add_argument":
            for word in node.args:
                literal = isinstance(word, ast.Constant) and isinstance(word.value, str)
                yield word.value if literal else None


def _imported(tree: ast.AST, folder: Path) -> Iterator[Path]:
    """Files of imported modules, where one is found from the script's folder on."""
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        for name in names:
            # The standard library and packages without a path have no flags for Megatron.
            if name.partition(".")[0] not in sys.stdlib_module_names:
                yield from _files(name, folder)


def _files(name: str, folder: Path) -> Iterator[Path]:
    """The file of a module in the script's folder, else on the path."""
    for root in (folder, *map(Path, sys.path)):
        place = root.joinpath(*name.split("."))
        for file in (place.with_suffix(".py"), place / "__init__.py"):
            if file.is_file():
                yield file
                return
