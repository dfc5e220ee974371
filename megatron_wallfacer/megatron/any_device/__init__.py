"""Replace parts of Megatron that fail on any device if TransformerEngine, Apex or a compiler is missing.

=================  =============================================================  ==================================
module             failure in Megatron                                            condition
=================  =============================================================  ==================================
dataset_helpers    `make` in megatron/core/datasets ends the run                  megatron-core's wheel, no Makefile
norms              `--sequence-parallel` with torch's norms; RMSNorm with Apex    no TransformerEngine
optimizer_state    resuming the distributed optimizer with torch's Adam           neither TransformerEngine nor Apex
thd                a packed batch is not split, because `tex` is None             no TransformerEngine
uneven             gathers of parts of different lengths                          groups of gloo
=================  =============================================================  ==================================

Each module of this package replaces functions only under the module's condition in the table.
Replacements that only a node without CUDA needs are in `cpu_runtime`.
"""

from __future__ import annotations

from functools import cache

__all__ = ["install"]


@cache
def install() -> None:
    """Install all replacements in this process. A second call of this function has no effect.

    This function imports `megatron`, so `sys.path` must already be the path of the user's script.

    Raises:
        WallfacerError: Megatron does not have a function that must be replaced.
    """
    from megatron_wallfacer.megatron.any_device import dataset_helpers, norms, optimizer_state, thd, uneven

    for part in (dataset_helpers, norms, optimizer_state, thd, uneven):
        part.install()
