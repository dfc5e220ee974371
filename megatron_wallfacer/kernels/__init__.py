"""Kernels: attention of one tile on one device, with its log-sum-exp."""

from megatron_wallfacer.kernels.protocol import Kernel
from megatron_wallfacer.kernels.select import KERNELS, candidates, select_kernel

__all__ = ["KERNELS", "Kernel", "candidates", "select_kernel"]
