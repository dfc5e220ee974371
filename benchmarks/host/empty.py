"""Attention, merges, sums and copies as empty functions: what is left of a pass is the host's work.

A function that returns tensors runs in the first pass, and its results are given again in all later passes, in the same
order. So the tensors have the right shapes, and a call costs one step of an iterator.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from inspect import getmembers, isfunction
from itertools import cycle
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from megatron_wallfacer.engine import compiled, row_lists
from megatron_wallfacer.kernels.protocol import accumulation_dtype
from megatron_wallfacer.kernels.reference import ReferenceKernel

#: Modules whose public functions work on rows: each call is one launch on a GPU (merge, row sums, output proxy).
ROW_MODULES = ("megatron_wallfacer.engine.merge",)
#: Copies and sums: methods of a tensor, and functions of torch on lists of tensors.
TENSOR_METHODS = ("copy_", "add_", "fill_", "zero_")
LIST_FUNCTIONS = ("_foreach_copy_", "_foreach_add_")


class Replay:
    """A function that runs during the first pass and returns the same results, in turn, in the later passes.

    Attributes:
        calls: number of calls in the first pass.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function, self._results = function, []
        self._next: Callable[[], Any] | None = None

    @property
    def calls(self) -> int:
        return len(self._results)

    def __call__(self, *args: Any, **options: Any) -> Any:
        if self._next is not None:
            return self._next()
        self._results.append(self._function(*args, **options))
        return self._results[-1]

    def repeat(self) -> None:
        """End the first pass."""
        self._next = cycle(self._results).__next__


class EmptyKernel(ReferenceKernel):
    """A kernel that computes nothing. It can do what the reference kernel can.

    Attributes:
        forward, backward: of one tile; results of the right shapes and dtypes.
    """

    name = "empty"

    def __init__(self) -> None:
        super().__init__()
        self.forward, self.backward = Replay(_forward), Replay(_backward)


def _forward(q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
    out = q.new_zeros((*q.shape[:3], v.shape[3]))
    return out, q.new_zeros(q.shape[:3], dtype=accumulation_dtype(q.dtype))


def _backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)


@contextmanager
def empty_rows() -> Iterator[list[Replay]]:
    """Replace the functions of :data:`ROW_MODULES` wherever the package has imported them, and launches of lists.

    Lists of row operations take the path of a GPU: each is one launch.
    """
    replays = {}
    lists = Replay(lambda tensors: None)
    for name in ROW_MODULES:
        module = importlib.import_module(name)
        for _, function in getmembers(module, isfunction):
            if function.__module__ == name and not function.__name__.startswith("_"):
                replays[function] = Replay(function)
    with ExitStack() as stack:
        for module in [module for name, module in sys.modules.items() if name.startswith("megatron_wallfacer")]:
            for name, function in getmembers(module, isfunction):
                if function in replays:
                    stack.enter_context(mock.patch.object(module, name, replays[function]))
        launches = SimpleNamespace(RowLaunch=lambda table, *, merges: lists)
        stack.enter_context(mock.patch.object(row_lists, "kernels", return_value=launches))
        stack.enter_context(mock.patch.object(compiled, "rows_in_one_launch", return_value=True))
        yield [*replays.values(), lists]


@contextmanager
def empty_copies() -> Iterator[None]:
    """Replace :data:`TENSOR_METHODS` and :data:`LIST_FUNCTIONS` by functions that do nothing."""
    with ExitStack() as stack:
        for name in TENSOR_METHODS:
            stack.enter_context(mock.patch.object(Tensor, name, _itself))
        for name in LIST_FUNCTIONS:
            stack.enter_context(mock.patch.object(torch, name, _itself))
        yield


def _itself(target: Any, *_: Any, **__: Any) -> Any:
    return target
