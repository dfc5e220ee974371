"""Activations in host memory under Megatron: flags, sizes, and where tensors are handed over and taken."""
