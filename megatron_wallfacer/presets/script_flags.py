"""Find the flags that a script adds to Megatron's parser (``extra_args_provider``), without running the script."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path


def flags_of_script(script: Path) -> frozenset[str] | None:
    """Return the flags in the ``add_argument`` calls of a script and of the modules that it imports.

    The script is parsed but not run. Imports in modules of the script's folder are followed. Other modules, such as
    Megatron's, are read only if a module of the script's folder imports them directly.

    Returns:
        The flags; None if the script, or a module in its folder, builds the name of a flag at run time.
    """
    flags: set[str] = set()
    folder, done, to_read = script.resolve().parent, set[Path](), [script.resolve()]
    while to_read:
        file = to_read.pop()
        if file in done:
            continue
        done.add(file)
        try:
            tree = ast.parse(file.read_bytes())
        except (OSError, SyntaxError, ValueError):
            continue
        added = list(_added(tree))
        flags.update(filter(None, added))
        if file.parent == folder:
            if None in added:
                return None
            to_read += _imported(tree, folder)
    return frozenset(flags)


def _added(tree: ast.AST) -> Iterator[str | None]:
    """Yield the names in calls of ``add_argument``, or None for a name that is not a literal."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "add_argument":
            for argument in node.args:
                is_literal = isinstance(argument, ast.Constant) and isinstance(argument.value, str)
                yield argument.value if is_literal else None


def _imported(tree: ast.AST, folder: Path) -> Iterator[Path]:
    """Yield the source file of each imported module. The module is in the script's folder or on ``sys.path``."""
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        for name in names:
            # The standard library adds no flags to Megatron's parser.
            if name.partition(".")[0] not in sys.stdlib_module_names:
                places = (root.joinpath(*name.split(".")) for root in (folder, *map(Path, sys.path)))
                files = (file for place in places for file in (place.with_suffix(".py"), place / "__init__.py"))
                yield from islice(filter(Path.is_file, files), 1)
