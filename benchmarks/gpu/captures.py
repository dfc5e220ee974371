"""Captures for the graphs part: of CUDA on a GPU, on a tape elsewhere, to see that the measurement runs."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_wallfacer.engine.foreign import capturing
from megatron_wallfacer.engine.graphed import CudaCapture
from megatron_wallfacer.engine.transfers import Transfers
from tests.engine import tape

#: TransformerEngine's variable: gradients repeat bit by bit, so a replay must equal an eager pass.
DETERMINISTIC = "NVTE_ALLOW_NONDETERMINISTIC_ALGO"


@dataclass(frozen=True)
class Captures:
    """How graphs are made on a device.

    Attributes:
        make: returns a :class:`megatron_wallfacer.engine.graphed.CudaCapture`.
        in_progress: whether some capture records what is launched.
        transfers: class of transfers that such a capture can record.
    """

    make: Callable[[], Any]
    in_progress: Callable[[], bool]
    transfers: type[Transfers]


def captures_of(device: torch.device) -> Captures:
    """Return how graphs are made on a device; deterministic kernels are requested."""
    os.environ[DETERMINISTIC] = "0"
    if device.type == "cuda":
        return Captures(CudaCapture, capturing, Transfers)
    return Captures(tape.TapeCapture, tape.recording, tape.TapedTransfers)


class Counted:
    """A capture that counts its graphs and their replays.

    Args:
        capture: makes the graphs.
    """

    def __init__(self, capture: Any) -> None:
        self._capture, self.graphs, self.replays = capture, 0, 0
        self.in_progress = capture.in_progress

    def __call__(self, run: Callable[[], None]) -> torch.cuda.CUDAGraph:
        graph = self._capture(run)
        self.graphs += 1
        return _CountedGraph(graph, self)


@dataclass(frozen=True)
class _CountedGraph:
    graph: torch.cuda.CUDAGraph
    owner: Counted

    def replay(self) -> None:
        self.owner.replays += 1
        self.graph.replay()

    def reset(self) -> None:
        self.graph.reset()


def apart(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """Return the largest difference between tensors; a nan is infinitely far from everything."""
    differences = [(x.double() - y.double()).abs() for x, y in zip(found, wanted, strict=True)]
    return max(torch.nan_to_num(one, nan=float("inf")).max().item() for one in differences)
