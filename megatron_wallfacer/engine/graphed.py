"""Passes as CUDA graphs: two eager passes, then a capture, then replays.

If shards are short, the host needs more time to launch a pass than the GPU needs to run the pass. A graph needs one
launch. Addresses in a graph are fixed. So inputs are copied into static buffers before a replay, and results are copied
out of static buffers after the replay. All layers and micro-batches with tensors of equal shapes share one forward
graph and one backward graph. A capture must neither fill kernel caches nor create NCCL connections, so the two eager
passes do both.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_wallfacer.engine.compiled import CompiledPass
from megatron_wallfacer.engine.execute import PassResults, Tensors, allocate, count_received, run_steps
from megatron_wallfacer.engine.foreign import ForeignCaptures, capturing
from megatron_wallfacer.engine.groups import AxisGroups
from megatron_wallfacer.engine.timeline import Observer, no_observer, observes
from megatron_wallfacer.engine.transfers import Transfers
from megatron_wallfacer.engine.waits.progress import PROGRESS
from megatron_wallfacer.kernels.prepared import prepared_calls
from megatron_wallfacer.schedule.rows import contiguous

#: Number of passes that run eagerly before a capture.
EAGER_PASSES = 2
#: Largest number of captures per set of groups. Each capture needs memory. A model has one per kind of layer and pass.
LIMIT = 16


class CudaCapture:
    """A function that captures CUDA graphs. Passes do not overlap, so all graphs share one memory pool."""

    #: Function that returns whether a capture of another owner records launches now.
    in_progress = staticmethod(capturing)

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Callable[[], None]) -> torch.cuda.CUDAGraph:
        """Capture the launches of a function without running them."""
        graph = torch.cuda.CUDAGraph()
        # NCCL's watchdog queries events in another thread during the capture, hence `thread_local`. A failed capture
        # does not restore the current stream, so the outer context does.
        with (
            torch.cuda.stream(torch.cuda.current_stream()),
            torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"),
        ):
            run()
        return graph


@dataclass(frozen=True, eq=False)
class _StaticPass:
    """A captured pass, its buffers outside the memory pool of the graph, and the constants that the graph reads."""

    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor]
    results: list[Tensor]
    kept: list[Tensor]
    workspace: Tensor
    constants: list[Callable[..., object]]

    def replay(self, inputs: Tensors) -> PassResults:
        """Copy the inputs into static buffers, replay the graph, and return copies of all its outputs."""
        for static, x in zip(self.inputs, inputs, strict=True):
            static.copy_(x)
        self.graph.replay()
        return [x.clone() for x in self.results], [x.clone() for x in self.kept]


def contiguous_strides(x: Tensor) -> tuple[int, ...]:
    """Return the strides of a contiguous tensor with the same shape."""
    return contiguous(x.shape)


class Graphs:
    """The captured passes of one set of process groups.

    Args:
        groups: process groups of this rank. All ranks of the context-parallel group capture the same passes in the same
            order.
        capture: function that captures a graph.
        free: function that frees Megatron's own CUDA graphs
            (:class:`megatron_wallfacer.engine.foreign.ForeignCaptures`).
    """

    #: Function from a tensor to the strides for which passes are lowered. Static inputs are contiguous.
    strides = staticmethod(contiguous_strides)

    def __init__(self, groups: AxisGroups, capture: CudaCapture, free: Callable[[], None] = lambda: None) -> None:
        self._groups, self._capture = groups, capture
        self._eager = ForeignCaptures(free, capture.in_progress)
        # Entries are dropped together with their compiled passes.
        self._runs: WeakKeyDictionary[CompiledPass, int] = WeakKeyDictionary()
        self._passes: WeakKeyDictionary[CompiledPass, _StaticPass | None] = WeakKeyDictionary()
        # A counter, because the number of entries could differ between ranks.
        self._captures = 0

    def run(
        self, compiled: CompiledPass, inputs: Tensors, given: Tensors, transfers: Transfers, observer: Observer
    ) -> PassResults:
        """Replay the graph of a pass; without a graph run :func:`megatron_wallfacer.engine.execute.execute`.

        Inputs may have any strides, although the pass was lowered for contiguous inputs. With an observer the pass runs
        eagerly, because steps inside a CUDA graph cannot be observed. If another library captures a CUDA graph now, the
        pass runs eagerly, and the graph of that library records the launches.
        """
        eager = observes(observer) or self._eager.in_progress()
        static = None if eager else self._static_pass(compiled, (*inputs, *given))
        if static is None:
            return self._eager.run(compiled, [x.contiguous() for x in inputs], given, transfers, observer)
        with observer(compiled.label):
            results, kept = static.replay((*inputs, *given))
        count_received(compiled, transfers)
        return results, kept

    def drop(self) -> None:
        """Free all graphs. The caller destroys the process groups of the graphs afterwards."""
        for static in self._passes.values():
            if static is not None:
                static.graph.reset()
        self._passes.clear()
        self._runs.clear()
        self._eager.drop()

    def _static_pass(self, compiled: CompiledPass, inputs: Tensors) -> _StaticPass | None:
        """Return the captured pass; None if the pass runs eagerly. The capture after the eager passes is collective."""
        if compiled in self._passes:
            return self._passes[compiled]
        runs = self._runs[compiled] = self._runs.get(compiled, 0) + 1
        if runs <= EAGER_PASSES:
            return None
        del self._runs[compiled]
        self._captures += 1
        static = self._passes[compiled] = self._agreed(compiled, inputs)
        return static

    def _agreed(self, compiled: CompiledPass, inputs: Tensors) -> _StaticPass | None:
        """Capture a pass on all ranks of the context-parallel group. If one rank fails, all ranks return None."""
        static, reason = None, ""
        try:
            if self._captures > LIMIT:
                raise RuntimeError(f"{LIMIT} passes have a CUDA graph already")
            static = self._captured(compiled, inputs)
        except Exception as error:  # after any error of a library in a capture, eager passes work
            reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            # Works keep the tensors of the capture, and the eager pass needs this memory.
            PROGRESS.in_flight = ()
        failed = _first_failed(self._groups, compiled.device, bool(reason))
        if failed is None:
            return static
        if static is not None:
            static.graph.reset()
        if failed == self._groups.rank:
            print(
                f"wallfacer: context-parallel rank {failed}: no CUDA graph of a {compiled.label}, "
                f"which all ranks of the group run without one: {reason}",
                flush=True,
            )
        return None

    def _captured(self, compiled: CompiledPass, inputs: Tensors) -> _StaticPass:
        # Buffers that are created in inference mode cannot be written outside inference mode.
        with torch.inference_mode(False), torch.no_grad():
            static = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in inputs]
            results, kept, workspace = allocate(compiled)
            buffers = [*static, *results, *kept, workspace]
            with prepared_calls(compiled.kernel) as constants:
                graph = self._capture(lambda: run_steps(compiled, buffers, no_observer))
        return _StaticPass(graph, static, results, kept, workspace, constants)


def graphs_of(transfers: Transfers, free: Callable[[], None] = lambda: None) -> Graphs:
    """Return the :class:`Graphs` object of ``transfers``. The first call creates the object."""
    if transfers.graphs is None:
        transfers.graphs = Graphs(transfers.groups, CudaCapture(), free)
    return transfers.graphs


def _first_failed(groups: AxisGroups, device: torch.device, failed: bool) -> int | None:
    """Return on every rank the lowest context-parallel rank that failed; None if no rank failed."""
    size = groups.grid.cp_size
    first = torch.tensor([groups.rank if failed else size], device=device)
    if ("cp", "inputs") in groups.groups:
        dist.all_reduce(first, op=dist.ReduceOp.MIN, group=groups.groups["cp", "inputs"])
    rank = int(first.item())
    return None if rank == size else rank
