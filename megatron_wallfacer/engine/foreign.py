"""Passes inside a CUDA graph that the plugin does not own, such as Megatron's graph of a layer.

The graph captures all kernel launches and transfers of a pass, and provides the memory of the workspace. This module
has two duties.

* Check that a captured pass has run eagerly before: a capture must not compile kernels or copy constants to the GPU.
* Keep references to the constants that graph replays read, until the process groups are destroyed.
"""

from __future__ import annotations

from collections.abc import Callable
from weakref import WeakSet

import torch
from torch import Tensor

from megatron_wallfacer.engine.compiled import CompiledPass
from megatron_wallfacer.engine.execute import PassResults, Tensors, execute
from megatron_wallfacer.engine.timeline import Observer, no_observer
from megatron_wallfacer.engine.transfers import Transfers
from megatron_wallfacer.errors import WallfacerError
from megatron_wallfacer.kernels.prepared import prepared_calls


def capturing() -> bool:
    """Return whether launches on the current stream are recorded into a CUDA graph."""
    # Looked up in each call, because the CPU runtime replaces functions of torch.cuda.
    return torch.cuda.is_current_stream_capturing()


class ForeignCaptures:
    """Runner of passes that another library may capture into its own CUDA graph.

    Args:
        free: function that frees the graphs of the owner. :meth:`drop` calls the function if a pass was captured.
        in_progress: function that returns whether a CUDA graph capture is in progress.
    """

    #: Function from a tensor to the strides for which passes are lowered.
    strides = staticmethod(Tensor.stride)

    def __init__(self, free: Callable[[], None] = lambda: None, in_progress: Callable[[], bool] = capturing) -> None:
        self._free, self.in_progress = free, in_progress
        self._ran: WeakSet[CompiledPass] = WeakSet()
        # Captured passes and prepared calls of the kernel, by identity.
        self._held: dict[int, object] = {}

    def run(
        self, compiled: CompiledPass, inputs: Tensors, given: Tensors, transfers: Transfers, observer: Observer
    ) -> PassResults:
        """Run one pass; see :func:`megatron_wallfacer.engine.execute.execute`.

        Inside a capture the observer is not called. Received bytes are counted at the capture, not at each replay.

        Raises:
            WallfacerError: A capture contains a pass that has not run eagerly before.
        """
        if not self.in_progress():
            done = execute(compiled, inputs, given, transfers, observer)
            self._ran.add(compiled)
            return done
        if compiled not in self._ran:
            raise WallfacerError(
                f"a CUDA graph captures a {compiled.label} of shapes that have not run before: "
                "run the layer once with them, outside the capture"
            )
        with prepared_calls(compiled.kernel) as calls:
            done = execute(compiled, inputs, given, transfers, no_observer)
        self._held.update((id(one), one) for one in (compiled, *calls))
        return done

    def drop(self) -> None:
        """Free the graphs of the owner. The caller destroys the process groups of the graphs afterwards."""
        if self._held:
            self._free()
        self._held.clear()


def foreign_captures(transfers: Transfers, free: Callable[[], None]) -> ForeignCaptures:
    """Return the :class:`ForeignCaptures` object of ``transfers``. The first call creates the object."""
    if transfers.graphs is None:
        transfers.graphs = ForeignCaptures(free)
    return transfers.graphs
