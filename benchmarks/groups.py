"""One set of process groups for all schemes of a run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist

Key = tuple[tuple[int, ...] | None, int]


class SharedGroups:
    """Gives a scheme the groups that an earlier one made of the same ranks.

    A gloo group has threads that wake many times a second, used or not. Those of thirteen schemes on 16 ranks took
    15 % of two cores. Schemes take turns, so they can share; within one scheme every group is its own.
    """

    def __init__(self) -> None:
        self._made: dict[Key, Any] = {}

    @contextmanager
    def for_one_scheme(self) -> Iterator[None]:
        """Have ``torch.distributed.new_group`` look for a group first, while a scheme makes its own."""
        original, asked = dist.new_group, Counter[tuple[int, ...] | None]()
        dist.new_group = self._finder(original, asked)
        try:
            yield
        finally:
            dist.new_group = original

    def _finder(self, original: Callable[..., Any], asked: Counter[tuple[int, ...] | None]) -> Callable[..., Any]:
        def new_group(ranks: Sequence[int] | None = None, *args: Any, **kwargs: Any) -> Any:
            members = None if ranks is None else tuple(ranks)
            asked[members] += 1
            # The second group of the same ranks within one scheme is the second of that kind: it is there for a reason.
            key = members, asked[members]
            if key not in self._made:
                self._made[key] = original(ranks, *args, **kwargs)
            return self._made[key]

        return new_group
