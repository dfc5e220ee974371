"""Execution of schedules on process groups and kernels. The package imports torch.distributed, but not Megatron."""
