"""Load the Triton kernels of row operations: PyTorch's wheels for CPUs do not include Triton."""

from __future__ import annotations

from functools import lru_cache
from types import SimpleNamespace

from megatron_wallfacer.kernels.optional import TRITON


@lru_cache(maxsize=1)
def kernels() -> SimpleNamespace:
    """Return the kernels by name: ``RowLaunch``, ``merge_into``, ``row_sums`` and ``out_proxy``.

    Raises:
        UnavailableError: Triton is not installed.
    """
    TRITON.load()
    # Imported only where there is a GPU.
    from megatron_wallfacer.engine.triton_proxy import out_proxy, row_sums
    from megatron_wallfacer.engine.triton_rows import RowLaunch, merge_into

    return SimpleNamespace(RowLaunch=RowLaunch, merge_into=merge_into, row_sums=row_sums, out_proxy=out_proxy)
