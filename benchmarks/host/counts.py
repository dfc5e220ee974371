"""What a pass calls and launches, counted, and the host time that this allows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
#: Slices of a pass: on top, for each attention call of forward and of backward, each other launch, each message.
PASS, ATTENTION, LAUNCH, MESSAGE = 60, (10, 16), 3, 4


@dataclass(frozen=True)
class Counts:
    """One pass of one rank.

    Attributes:
        attention: attention calls.
        launches: other launches: operators that are not views, and functions on rows.
        messages: sends, receives and collectives.
    """

    attention: int
    launches: int
    messages: int

    def allowed(self, *, backward: bool) -> int:
        """Host time of the pass, in slices."""
        return PASS + ATTENTION[backward] * self.attention + LAUNCH * self.launches + MESSAGE * self.messages


class Launches(TorchDispatchMode):
    """Counts operators: those that would launch something on a GPU, and those that send or receive.

    Attributes:
        launches: by operator.
        messages: by operator.
    """

    def __init__(self) -> None:
        super().__init__()
        self.launches: Counter[str] = Counter()
        self.messages: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        space, _, name = func._schema.name.partition("::")
        if space == "wallfacer":
            # The operator is the whole pass: count what it calls.
            with self:
                return func.redispatch(_CPU, *args, **kwargs)
        result = func(*args, **kwargs)
        if space == "c10d":
            self.messages[name] += 1
        elif space == "aten" and "empty" not in name and not _is_view(func, (args, kwargs), result):
            self.launches[name] += 1
        return result


def _is_view(func: Any, arguments: Any, result: Any) -> bool:
    given, made = ({id_of(x) for x in tree_leaves(tree) if isinstance(x, Tensor)} for tree in (arguments, result))
    return not func._schema.is_mutable and bool(given & made)


def id_of(x: Tensor) -> int:
    """The memory of a tensor, whatever part of it the tensor is."""
    return x.untyped_storage()._cdata
