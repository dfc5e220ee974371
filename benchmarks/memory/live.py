"""Count live bytes while operators run."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

#: Smaller storages, in bytes, are not followed unless asked for.
SMALLEST = 1 << 20


@dataclass(frozen=True)
class LiveBuffer:
    """One storage.

    Attributes:
        nbytes: its size.
        shape: shape of the tensor that was made with it.
        made_by: module and operator.
    """

    nbytes: int
    shape: tuple[int, ...]
    made_by: str


@dataclass
class Peak:
    """Most live bytes of a moment, and what was live then, largest first."""

    nbytes: int = 0
    buffers: list[LiveBuffer] = field(default_factory=list)


class LiveBytes(TorchDispatchMode):
    """Follows every storage that an operator makes, from its birth to its end.

    PyTorch's ``MemTracker`` does so by kind of tensor, without moments of a step and what is live at each.

    Args:
        known: tensors that are not counted, such as parameters.
        smallest: bytes of the smallest storage that is followed.

    Attributes:
        moment: name of what happens now; set from outside.
        module: name of the module whose forward pass runs; set from outside.
        peaks: peak by moment.
    """

    def __init__(self, known: Iterable[Tensor], smallest: int = SMALLEST) -> None:
        super().__init__()
        self._smallest, self._paused = smallest, False
        self.moment, self.module = "", ""
        self.peaks: dict[str, Peak] = {}
        self._known = {x.untyped_storage()._cdata for x in known}
        self._live: dict[int, LiveBuffer] = {}
        self._bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if self._paused:
            return result
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._see(leaf, str(func))
        return result

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Count nothing that is made inside of the block."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    def _see(self, tensor: Tensor, operator: str) -> None:
        storage = tensor.untyped_storage()
        key, nbytes = storage._cdata, storage.nbytes()
        if nbytes < self._smallest or key in self._live or key in self._known:
            return
        self._live[key] = LiveBuffer(nbytes, tuple(tensor.shape), f"{self.module} {operator}")
        self._bytes += nbytes
        weakref.finalize(storage, self._forget, key)
        peak = self.peaks.setdefault(self.moment, Peak())
        if self._bytes > peak.nbytes:
            peak.nbytes = self._bytes
            peak.buffers = sorted(self._live.values(), key=lambda buffer: -buffer.nbytes)

    def _forget(self, key: int) -> None:
        self._bytes -= self._live.pop(key).nbytes
