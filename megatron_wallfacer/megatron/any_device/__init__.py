"""What Megatron lacks on every device where its libraries are missing: TransformerEngine, Apex, a compiler.

=================  =============================================================  ==================================
module             what fails in Megatron                                         where
=================  =============================================================  ==================================
dataset_helpers    `make` in megatron/core/datasets ends the run                  megatron-core's wheel, no Makefile
norms              `--sequence-parallel` with torch's norms; RMSNorm with Apex    no TransformerEngine
optimizer_state    resuming the distributed optimizer with torch's Adam           neither TransformerEngine nor Apex
thd                a packed batch is not cut: `tex` is None                       no TransformerEngine
uneven             gathers of parts of different lengths                          groups of gloo
=================  =============================================================  ==================================

Where nothing is missing, each leaves Megatron as it is. Command lines are not touched here: what a user types on a GPU
stays as typed. What only a machine without CUDA needs is in `cpu_runtime`.
"""

from __future__ import annotations

__all__ = ["install"]

_installed = False


def install() -> None:
    """Complete Megatron for this process. Idempotent.

    Call it with `sys.path` as the user's script will see it: it imports the `megatron` found there.

    Raises:
        WallfacerError: This Megatron lacks something that has to be replaced.
    """
    global _installed
    if _installed:
        return
    from megatron_wallfacer.megatron.any_device import dataset_helpers, norms, optimizer_state, thd, uneven

    for part in (dataset_helpers, norms, optimizer_state, thd, uneven):
        part.install()
    _installed = True
