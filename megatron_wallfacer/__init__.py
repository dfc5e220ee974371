"""WallFacer for Megatron-LM: context parallelism on any grid of ranks, as a plugin.

    torchrun --nproc-per-node 8 -m megatron_wallfacer pretrain_gpt.py <arguments> --wallfacer-cp-size 8

This module imports nothing, so `python -m megatron_wallfacer` can report a wrong script path before it imports torch.
"""

__version__ = "0.1.0"
