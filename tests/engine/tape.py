"""A CUDA graph for CPUs: a capture records operators and transfers, a replay runs them on the same addresses.

As on a GPU no message travels in a capture. Operators do run there, on whatever the buffers hold.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_wallfacer.engine.operators import run_attention, run_attention_backward
from megatron_wallfacer.engine.transfers import Action, BoundTransfer, Transfers

#: Operators of the package are recorded piece by piece.
_PIECES = {"wallfacer::attention": run_attention, "wallfacer::attention_backward": run_attention_backward}


class TapeCall(NamedTuple):
    """One call: what it is, the addresses of its tensors, and the call itself."""

    name: str
    addresses: tuple[int, ...]
    again: Callable[[], object]


@dataclass
class Tape:
    """A captured graph."""

    calls: list[TapeCall] = field(default_factory=list)
    replays: int = 0
    resets: int = 0

    def replay(self) -> None:
        self.replays += 1
        for call in self.calls:
            call.again()

    def reset(self) -> None:
        self.resets += 1

    def add(self, name: str, tensors: Any, again: Callable[[], object]) -> None:
        found = tuple(x.data_ptr() for x in tree_leaves(tensors) if isinstance(x, Tensor))
        self.calls.append(TapeCall(name, found, again))


class TapeCapture:
    """Captures on a tape. With ``failing`` it raises, as a library may; with ``others`` another capture is active."""

    def __init__(self, *, failing: bool = False) -> None:
        self.failing, self.others, self.tapes = failing, False, []

    def __call__(self, run: Callable[[], None]) -> Tape:
        tape = Tape()
        with _Operators(tape):
            run()
            if self.failing:
                raise RuntimeError("operation not permitted when stream is capturing\nmore of it")
        self.tapes.append(tape)
        return tape

    def in_progress(self) -> bool:
        return self.others or recording()


def recording() -> bool:
    """Whether some capture is being made."""
    return _Operators.current is not None


class _Operators(TorchDispatchMode):
    """Runs each operator and records it; what only names memory (views, allocations) has no place in a graph."""

    current: Tape | None = None

    def __init__(self, tape: Tape) -> None:
        super().__init__()
        self._tape = tape
        self._before: list[Tape | None] = []

    def __enter__(self) -> Any:
        self._before.append(_Operators.current)
        _Operators.current = self._tape
        return super().__enter__()

    def __exit__(self, *args: Any) -> None:
        _Operators.current = self._before.pop()
        super().__exit__(*args)

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if operator.name() in _PIECES:
            with self:
                return _PIECES[operator.name()](*args, **kwargs)
        if torch._C._dispatch_has_kernel_for_dispatch_key(operator.name(), "CompositeImplicitAutograd"):
            # Inside an operator of the package such a one arrives whole: ``to`` may be a view or a copy.
            with self:
                return operator.decompose(*args, **kwargs)
        results = operator(*args, **kwargs)
        aliases = [value.alias_info for value in operator._schema.returns]
        if operator.name().startswith("aten::empty") or any(alias and not alias.is_write for alias in aliases):
            return results
        written = [] if any(aliases) else [x for x in tree_leaves(results) if isinstance(x, Tensor)]

        def again() -> None:
            # A graph writes new results where the captured ones were.
            fresh = tree_leaves(operator(*args, **kwargs))
            for into, x in zip(written, [x for x in fresh if isinstance(x, Tensor)], strict=False):
                into.copy_(x)

        self._tape.add(operator.name(), (args, kwargs), again)
        return results


class TapedTransfers(Transfers):
    """Transfers over gloo that a tape can record."""

    def bind(self, number: int, transfer: Any, device: torch.device) -> BoundTransfer:
        bound = super().bind(number, transfer, device)
        operands = [message.operand for message in (*transfer.sends, *transfer.receives)]
        return BoundTransfer(
            *(self._taped(f"{kind} {number}", action, operands) for kind, action in bound._asdict().items())
        )

    def _taped(self, name: str, action: Action | None, operands: Sequence[int]) -> Action | None:
        if action is None:
            return None

        def call(tensors: Sequence[Tensor], works: list[Any]) -> None:
            if _Operators.current is None:
                action(tensors, works)
            else:
                moved = [tensors[operand] for operand in operands]
                _Operators.current.add(name, moved, lambda: action(tensors, works))

        return call
