"""The step on real ranks: messages over gloo, a kernel that computes, every tensor with its values."""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist

from benchmarks.memory.live import Peak
from benchmarks.memory.model import count_step
from benchmarks.memory.opaque import OpaqueKernel, uncounted
from benchmarks.memory.setting import Setting
from megatron_wallfacer.engine import steps
from megatron_wallfacer.engine.connections import connected
from megatron_wallfacer.kernels.torch_cpu import TorchCpuKernel

#: Bytes of the smallest storage that is counted, for models of a few MB.
SMALLEST = 1 << 12


def count_all(settings: Sequence[Setting], ranks: int) -> list[dict[str, Peak]]:
    """Return for each setting the highest peak of each moment on any rank.

    Args:
        settings: what is counted.
        ranks: processes that are started; a multiple of each setting's ranks.
    """
    from megatron_wallfacer.megatron import any_device, cpu_runtime

    cpu_runtime.install()
    any_device.install()
    torch.set_num_threads(1)
    importlib.import_module("megatron.core.models.gpt")
    with tempfile.TemporaryDirectory() as folder:
        arguments = (ranks, settings, Path(folder))
        # Forked: Megatron is imported once. No thread of torch has been started.
        torch.multiprocessing.start_processes(_run_rank, arguments, nprocs=ranks, start_method="fork")
        return torch.load(Path(folder) / "results", weights_only=False)


def _run_rank(rank: int, ranks: int, settings: Sequence[Setting], folder: Path) -> None:
    store = dist.FileStore(str(folder / "store"), ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    counted = [count(setting) for setting in settings]
    everyone: list[list[dict[str, Peak]]] = [[]] * ranks
    dist.all_gather_object(everyone, counted)
    if rank == 0:
        torch.save([_highest(peaks) for peaks in zip(*everyone, strict=True)], folder / "results")
    dist.barrier()
    dist.destroy_process_group()


def _highest(peaks: Sequence[dict[str, Peak]]) -> dict[str, Peak]:
    return {moment: max((of[moment] for of in peaks), key=lambda peak: peak.nbytes) for moment in peaks[0]}


def count(setting: Setting) -> dict[str, Peak]:
    """Return the peak of each moment on this rank. Collective over the ranks of torch.distributed. See ``count_step``.

    Args:
        setting: tensor-parallel size times the grid's size is the number of ranks.
    """
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    grid = setting.plan.grid
    parallel_state.initialize_model_parallel(setting.work.tp, context_parallel_size=grid.cp_size)
    try:
        model_parallel_cuda_manual_seed(1)
        group = parallel_state.get_context_parallel_group()
        transfers = connected(group, grid, "direct", torch.device("cpu"))
        with _fused_row_operations():
            return count_step(setting, transfers, OpaqueKernel(TorchCpuKernel()), SMALLEST)
    finally:
        parallel_state.destroy_model_parallel()
        parallel_state.destroy_global_memory_buffer()


@contextmanager
def _fused_row_operations() -> Iterator[None]:
    """Merges and sums of rows as kernels that allocate nothing."""
    with ExitStack() as stack:
        for name in ("merge_rows", "sum_rows"):
            function = getattr(steps, name)

            def fused(*arguments: object, function: object = function) -> None:
                with uncounted():
                    function(*arguments)  # type: ignore[operator]

            stack.enter_context(mock.patch.object(steps, name, fused))
        yield
