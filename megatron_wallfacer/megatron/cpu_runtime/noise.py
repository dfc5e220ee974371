"""Filter warnings that are irrelevant without CUDA, and warnings that every rank would repeat."""

from __future__ import annotations

import logging
import warnings

from megatron_wallfacer.megatron.outputs import is_first_rank

# Regular expressions for the start of each message.
_WARNINGS = (
    # Five modules of Megatron announce at import that they use torch's own Adam, norms and multi-tensor functions.
    r"(Transformer Engine and )?Apex (is|are) not installed\. Falling back",
    # transformer_engine_spec_provider.py warns although this provider is not in use without CUDA.
    r"Only transformer-engine>=.* supports MoE experts",
    # torch's data loader warns because Megatron always requests pinned memory.
    r"'pin_memory' argument is set as true but no accelerator is found",
)

_RNG_MESSAGE = "CPU RNG state changed within GPU RNG context"


def install() -> None:
    """Install the warning filters of this module."""
    for message in _WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    if not is_first_rank():
        # Megatron's scripts filter these before importing Megatron, but the launcher imports Megatron earlier.
        for category in (UserWarning, FutureWarning):
            warnings.filterwarnings("ignore", category=category)
    # This logger reports a CUDA toolkit without a GPU.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    # Random states of CUDA are states of the CPU's generator here, so a change of the state is no error.
    logging.getLogger("megatron.core.tensor_parallel.random").addFilter(
        lambda record: not record.getMessage().startswith(_RNG_MESSAGE)
    )
