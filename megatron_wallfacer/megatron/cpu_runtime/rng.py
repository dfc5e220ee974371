"""The CPU's random generator serves as the CUDA device's.

Megatron's tracker (megatron/core/tensor_parallel/random.py) saves, seeds and restores "the CUDA state" around the
initialisation of weights and around dropout. The draws it brackets come from the CPU's generator, so that is the one
whose state it has to move. torch.cuda's own seeding functions are kept: they act on `torch.cuda.default_generators`.
(Putting torch.manual_seed in their place would not end: it seeds torch.cuda too.)
"""

from __future__ import annotations

import torch

from megatron_wallfacer.megatron.replace import replace


def install() -> None:
    """Give `torch.cuda` one generator, the CPU's."""
    replace("torch.cuda.default_generators", (torch.default_generator,))
    # torch.cuda.random bound these by name when torch was imported.
    replace("torch.cuda.random.current_device", torch.cuda.current_device)
    replace("torch.cuda.random.device_count", torch.cuda.device_count)
