"""The engine: runs schedules on process groups and kernels. It imports torch.distributed, but not Megatron."""
