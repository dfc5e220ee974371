"""Context-parallel attention for plain PyTorch, without Megatron."""

from megatron_wallfacer.attention.functional import attention, forget_groups

__all__ = ["attention", "forget_groups"]
