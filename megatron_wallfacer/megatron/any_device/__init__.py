"""Replace functions of Megatron that fail without TransformerEngine, Apex or a compiler, or with gloo groups.

=================  =============================================================  ==================================
module             failure in Megatron                                            condition
=================  =============================================================  ==================================
dataset_helpers    `make` in megatron/core/datasets ends the run                  megatron-core's wheel, no Makefile
norms              `--sequence-parallel` with torch's norms; RMSNorm with Apex    no TransformerEngine
optimizer_state    resuming the distributed optimizer with torch's Adam           neither TransformerEngine nor Apex
thd                a packed batch is not split, because `tex` is None             no TransformerEngine
uneven             gathers of parts of different lengths                          groups of gloo
=================  =============================================================  ==================================

If its condition in the table does not hold, a module changes no result of Megatron. Replacements that only a node
without CUDA needs are in `cpu_runtime`.
"""

from __future__ import annotations

from functools import cache

__all__ = ["install"]


@cache
def install() -> None:
    """Install all replacements in this process. A second call of this function has no effect.

    This function imports `megatron`, so `sys.path` must already be the module search path of the user's script.

    Raises:
        WallfacerError: A function of Megatron that this package replaces does not exist.
    """
    from megatron_wallfacer.megatron.any_device import dataset_helpers, norms, optimizer_state, thd, uneven

    for part in (dataset_helpers, norms, optimizer_state, thd, uneven):
        part.install()
