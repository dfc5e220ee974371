"""Imports go down the floors only; one floor and the corpus import Megatron, and two floors parse command lines."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "megatron_wallfacer"
#: From the ground up.
FLOORS = (
    "errors",
    "lists",
    "shipped",
    "input_files",
    "schedule",
    "offload",
    "kernels",
    "engine",
    "chrome_trace",
    "attention",
    "planning",
    "megatron",
    "presets",
    "doctor",
    "training_runs",
    "traces",
    "plots",
    "tuning",
    "cli",
)
#: A module of ours as a string: what importlib is given.
BY_STRING = re.compile(r"megatron_wallfacer(\.\w+)+")
MODULES = sorted(path.relative_to(PACKAGE.parent) for floor in FLOORS[1:] for path in (PACKAGE / floor).rglob("*.py"))


def imported(module: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse((PACKAGE.parent / module).read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: a relative import"
            yield node.module or ""
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and BY_STRING.fullmatch(node.value):
            yield node.value


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_imports_go_down(module: Path) -> None:
    here = FLOORS.index(module.parts[1])
    for name in imported(module):
        package, *rest = name.split(".")
        if package == "megatron_wallfacer" and rest:
            assert FLOORS.index(rest[0]) <= here, f"{module} imports {name}"
        if package == "megatron":
            # The demonstration writes its corpus with Megatron's own writer.
            assert module.parts[1] == "megatron" or module.match("training_runs/corpus.py"), f"{module} imports {name}"
        if module.parts[1] in ("schedule", "planning"):
            assert package not in ("torch", "numpy"), f"{module} imports {name}"
        if module.parts[1] not in ("cli", "megatron"):
            assert package != "argparse", f"{module} imports {name}"


def test_an_import_by_string_is_seen(tmp_path: Path) -> None:
    module = tmp_path / "module.py"
    module.write_text('import importlib\n\nimportlib.import_module("megatron_wallfacer.cli.main")\n')
    assert [*imported(module)] == ["importlib", "megatron_wallfacer.cli.main"]
