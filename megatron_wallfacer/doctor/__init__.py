"""Check this node for ``wallfacer doctor``: software, GPUs, kernels, network and environment variables."""
