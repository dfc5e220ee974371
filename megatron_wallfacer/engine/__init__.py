"""The engine floor: runs a schedule on process groups and kernels. Knows torch.distributed, not Megatron."""
