"""Modules with Triton kernels, loaded once more: when kernels are defined, it is decided how they run."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import pytest


@contextmanager
def kernels(name: str, *, interpreted: bool) -> Iterator[ModuleType]:
    """A copy of a module of the engine, whose kernels run in Triton's interpreter, or can be compiled."""
    pytest.importorskip("triton")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", str(int(interpreted)))
        spec = importlib.util.find_spec(f"megatron_wallfacer.engine.{name}")
        copy = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(copy)
        yield copy
