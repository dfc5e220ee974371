"""Warnings that say nothing on a machine without CUDA, and those that every rank would repeat."""

from __future__ import annotations

import logging
import os
import warnings

# Each is a regular expression for the beginning of the message.
_WARNINGS = (
    # Five modules of Megatron announce at import that they use torch's own Adam, norms and multi-tensor functions.
    r"(Transformer Engine and )?Apex (is|are) not installed\. Falling back",
    # transformer_engine_spec_provider.py, of a provider that is not used: Transformer Engine needs CUDA.
    r"Only transformer-engine>=.* supports MoE experts",
    # torch's data loader: Megatron always asks for pinned memory.
    r"'pin_memory' argument is set as true but no accelerator is found",
)

# Says that a CUDA toolkit is installed but no GPU is: known.
_CUDA_HOME_LOGGER = "torch.utils.cpp_extension"

_RNG_LOGGER = "megatron.core.tensor_parallel.random"
_RNG_MESSAGE = "CPU RNG state changed within GPU RNG context"


def _not_about_the_cpu_generator(record: logging.LogRecord) -> bool:
    """The tracker warns at each weight that the CPU's generator moved. It has to: it is the device's (see `rng`)."""
    return not record.getMessage().startswith(_RNG_MESSAGE)


def install() -> None:
    """Filter the messages above."""
    for message in _WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    if os.environ.get("RANK", "0") != "0":
        # Megatron's scripts do this on their first lines, before they import Megatron. Here it is imported before them.
        for category in (UserWarning, FutureWarning):
            warnings.filterwarnings("ignore", category=category)
    logging.getLogger(_CUDA_HOME_LOGGER).setLevel(logging.ERROR)
    logging.getLogger(_RNG_LOGGER).addFilter(_not_about_the_cpu_generator)
