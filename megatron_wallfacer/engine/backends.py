"""Which backend of a process group carries the messages of a device."""

from __future__ import annotations

import torch
import torch.distributed as dist

from megatron_wallfacer.errors import OptionError


def backend_of(group: dist.ProcessGroup | None, device: torch.device) -> str | None:
    """Return the backend that a group uses for tensors on a device, or None if it has none for them.

    ``torch.distributed.get_backend`` does not answer this: it returns the string that the group was made with, which is
    ``undefined`` after a plain ``init_process_group()`` and ``cpu:gloo,cuda:nccl`` for a group of two backends.

    Args:
        group: process group of this rank; None for the world.
        device: device of the tensors; only its type matters.
    """
    pairs = (pair.split(":") for pair in dist.get_backend_config(group).split(","))
    return {name: backend for name, backend in pairs}.get(device.type)


def is_alive(group: dist.ProcessGroup | None) -> bool:
    """Return whether a process group can be used: torch.distributed has not destroyed it.

    Args:
        group: process group; None stands for one process without torch.distributed.
    """
    if group is None:
        return not dist.is_initialized()
    try:
        dist.get_rank(group)
    except ValueError:
        return False
    return True


def check_alive(group: dist.ProcessGroup | None) -> None:
    """Check that a process group can be used; see :func:`is_alive`.

    Raises:
        OptionError: torch.distributed has destroyed it.
    """
    if not is_alive(group):
        raise OptionError("group", "a destroyed one", "a process group that torch.distributed still has")
