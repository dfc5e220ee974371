"""Read Megatron's options for communicators, and describe this rank's process groups for the startup report."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_wallfacer.engine.groups import AxisGroups
from megatron_wallfacer.errors import WallfacerError
from megatron_wallfacer.input_files import read_yaml

#: Name of the context-parallel group in Megatron's YAML file of communicators and in its priority groups.
CP = "cp"


def nccl_options(args: argparse.Namespace) -> Callable[[], Any]:
    """Return a function that makes NCCL options for a group, like the options of Megatron's context-parallel group.

    The options are the entry ``cp`` of ``--nccl-communicator-config-path``, plus a high-priority stream if
    ``--high-priority-stream-groups`` has ``cp``. Each group needs its own options object, because torch.distributed
    writes the group's name and ranks into the object.

    Raises:
        WallfacerError: The file is not YAML, is too large, or contains something other than mappings.
    """
    path = getattr(args, "nccl_communicator_config_path", None)
    entries = {} if path is None else _entries(Path(path))
    if CP in (getattr(args, "high_priority_stream_groups", None) or ()):
        entries = entries | {CP: entries.get(CP, {}) | {"is_high_priority_stream": True}}

    def options() -> Any:
        from megatron.core import parallel_state

        return parallel_state.get_nccl_options(CP, entries)

    return options


def _entries(path: Path) -> dict[str, dict[str, Any]]:
    file = read_yaml(path)
    entries = {} if file.data is None else file.data
    if not isinstance(entries, dict) or not all(isinstance(entry, dict) for entry in entries.values()):
        raise WallfacerError(f"{path}: must map names of groups to options of NCCL")
    return entries


def groups_text(grids: Sequence[AxisGroups]) -> str:
    """Return sentences about this rank's process groups: names, sizes, seconds to connect, and any GPU memory."""
    names: dict[dist.ProcessGroup, str] = {}
    for groups in grids:
        for (axis, kind), group in groups.groups.items():
            names.setdefault(group, CP if axis == CP else f"{axis} {kind}")
    listed = ", ".join(f"{name} ({dist.get_world_size(group)} ranks)" for group, name in names.items())
    seconds, used = (sum(getattr(groups, name) for groups in grids) for name in ("seconds", "device_bytes"))
    memory = f" and {used / 2**20:,.0f} MiB of GPU memory" if used else ""
    number = f"{len(names)} process group{'s' if len(names) > 1 else ''}"
    return f"The rank is in {number}: {listed}. Connecting took {seconds:.2f} s{memory}."


def gathered[T](value: T) -> list[T]:
    """Return the values of all ranks, in the order of the ranks. All ranks must call this function."""
    values = [value] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def destroy_world() -> None:
    """Destroy all remaining process groups. Megatron itself does not destroy its groups before the process ends."""
    if dist.is_initialized():
        dist.destroy_process_group()
