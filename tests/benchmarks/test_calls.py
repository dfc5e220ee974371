"""The count of the call path, and its limits."""

from __future__ import annotations

from collections import Counter
from functools import cache
from pathlib import Path

import pytest

from benchmarks import calls
from benchmarks.calls import CallPath, count, profiled

#: Functions of a package, as :func:`profiled` sees them.
SOURCE = """
def outer():
    return [inner(x) for x in (1, 2)] + list(steps()) + [(lambda: 0)()]

def inner(x):
    return x

def steps():
    yield 1
    yield 2
"""


@cache
def both() -> tuple[CallPath, CallPath]:
    return count()


@pytest.mark.parametrize("index", [0, 1], ids=["forward", "backward"])
def test_a_warm_pass_is_within_the_limits(index: int) -> None:
    path = both()[index]
    assert len(path.files) <= calls.FILES, path.files
    assert len(path.calls) <= calls.FUNCTIONS, list(path.calls)
    assert path.calls.total() <= path.allowed, path.calls.most_common()


def test_the_path_goes_from_autograd_to_the_library() -> None:
    for path in both():
        assert path.tiles == 16
        assert path.steps > 0
        assert "kernels/te.py" in path.files


def test_functions_lambdas_and_steps_of_generators_are_calls(tmp_path: Path) -> None:
    file, scope = tmp_path / "module.py", {}
    exec(compile(SOURCE, str(file), "exec"), scope)
    found = {name: number for (_, name, _), number in profiled(scope["outer"], tmp_path).items()}
    # The generator is entered, resumed, and resumed once more to end.
    assert found == {"outer": 1, "inner": 2, "steps": 3, "outer.<locals>.<lambda>": 1}
    assert not profiled(scope["outer"], tmp_path / "elsewhere")


@pytest.mark.parametrize(
    ("functions", "files", "per_function", "code"),
    [(30, 10, 3, 0), (31, 10, 1, 1), (30, 11, 1, 1), (30, 10, 4, 1)],
    ids=["within", "functions", "files", "calls"],
)
def test_a_check_fails_above_each_limit(
    monkeypatch: pytest.MonkeyPatch, functions: int, files: int, per_function: int, code: int
) -> None:
    # Allowed are 60 + 8 * 3 + 4 * 2 = 92 calls.
    counted = Counter({(f"{i % files}.py", str(i), 1): per_function for i in range(functions)})
    path = CallPath(counted, tiles=3, steps=2)
    assert path.allowed == 92
    monkeypatch.setattr(calls, "count", lambda launches: (CallPath(Counter(), 3, 2), path))
    assert calls.main(["--check"]) == code
    assert calls.main([]) == 0
