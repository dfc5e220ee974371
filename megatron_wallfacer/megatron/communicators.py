"""What Megatron's arguments say about communicators, and what the start-up block says about this rank's."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import torch.distributed as dist
import yaml

from megatron_wallfacer.engine.groups import AxisGroups

#: Megatron's name of the context-parallel group, in its YAML file of communicators and among its priority groups.
CP = "cp"


def nccl_options(args: argparse.Namespace) -> Callable[[], Any]:
    """Return what makes the options of one NCCL group: those that Megatron gives its context-parallel group.

    They are the ``cp`` entry of ``--nccl-communicator-config-path``, and a stream of high priority where
    ``--high-priority-stream-groups`` has ``cp``. A function, because torch.distributed writes a group's name and ranks
    into its options.

    Args:
        args: Megatron's, validated.
    """
    path = getattr(args, "nccl_communicator_config_path", None)
    entries: dict[str, dict[str, Any]] = {}
    if path is not None:
        with open(path) as stream:
            entries = yaml.safe_load(stream) or {}
    if CP in (getattr(args, "high_priority_stream_groups", None) or ()):
        entries = entries | {CP: entries.get(CP, {}) | {"is_high_priority_stream": True}}

    def options() -> Any:
        from megatron.core import parallel_state

        return parallel_state.get_nccl_options(CP, entries)

    return options


def groups_text(grids: Sequence[AxisGroups]) -> str:
    """Return this rank's process groups in words: number, names, sizes, seconds, GPU memory.

    Args:
        grids: this rank's groups of each grid.
    """
    names: dict[dist.ProcessGroup, str] = {}
    for groups in grids:
        for (axis, kind), group in groups.groups.items():
            names.setdefault(group, CP if axis == CP else f"{axis} {kind}")
    listed = ", ".join(f"{name} ({dist.get_world_size(group)} ranks)" for group, name in names.items())
    text = f"{len(names)}: {listed}; made in {sum(groups.seconds for groups in grids):.2f} s"
    used = sum(groups.device_bytes for groups in grids)
    return f"{text}, {used / 2**20:,.0f} MiB of GPU memory" if used else text


def destroy_world() -> None:
    """Destroy all process groups that are left. Megatron itself leaves its own to the end of the process."""
    if dist.is_initialized():
        dist.destroy_process_group()
