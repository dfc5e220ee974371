"""Move activations of Megatron's layers to host memory: flags, sizes, and the functions that store and load tensors."""
