"""Define the state of the plugin in one process, which the hooks share."""

from __future__ import annotations

import argparse
import os
import uuid
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import cached_property
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_wallfacer.chrome_trace import TraceSource
from megatron_wallfacer.engine.connections import close_groups, connected, find
from megatron_wallfacer.engine.groups import AxisGroups, is_alive
from megatron_wallfacer.engine.leaving import at_exit
from megatron_wallfacer.engine.ranges import Ranges
from megatron_wallfacer.engine.timeline import Observer, combined
from megatron_wallfacer.engine.transfers import Transfers
from megatron_wallfacer.errors import WallfacerError
from megatron_wallfacer.kernels import Kernel, select_kernel
from megatron_wallfacer.megatron.agreement.start import Parsed
from megatron_wallfacer.megatron.auto_tiles import ChosenTiles
from megatron_wallfacer.megatron.communicators import destroy_world, nccl_options
from megatron_wallfacer.megatron.flags import flag_errors
from megatron_wallfacer.megatron.graphs import FLAG, check_graphs
from megatron_wallfacer.megatron.hook import Hook
from megatron_wallfacer.megatron.host_memory.inputs import LayerInputs
from megatron_wallfacer.megatron.metrics import StepSums, step_sums
from megatron_wallfacer.megatron.outputs import Output, check_folder
from megatron_wallfacer.megatron.packed import Documents, shards_whole_sequence
from megatron_wallfacer.megatron.settings import Settings
from megatron_wallfacer.megatron.timeline import StepObserver
from megatron_wallfacer.megatron.verified import VerifiedSteps
from megatron_wallfacer.megatron.version import Version
from megatron_wallfacer.schedule.grid import Grid


class PluginState:
    """State of the plugin in one process.

    Args:
        version: version of Megatron.
        device: ``cpu`` or ``cuda``, as chosen by the launcher. The CPU runtime makes torch.cuda report a device.
        args: Megatron's arguments, or None until they are parsed.
        settings: settings of the plugin, or None while the plugin is off.

    Attributes:
        hooks: installed hooks, in the order of installation.
        switch_on: function that installs the hooks that the parsed flags enable.
        parsed: arguments that ranks compare, or None until they are parsed.
        models: number of models built so far.
        store: store of the job. This attribute keeps the store alive until torch.distributed connects to the store.
        chosen_tiles: activation memory before and after ``auto`` chose token tiles; None if no flag is ``auto``.
        axis_groups: process groups of this rank, one entry per grid of a plan.
        sums: sums of metrics, or None if this rank logs no metrics.
        log_output: :class:`Output` that writes the metrics of ``--wallfacer-log-metrics``.
        mtp_group: context-parallel group while a loss of multi-token prediction is computed, else None.
        layer_inputs: layer inputs in host memory, or None if layer inputs stay on the device.
    """

    def __init__(
        self,
        version: Version,
        device: torch.device,
        *,
        args: argparse.Namespace | None = None,
        settings: Settings | None = None,
    ) -> None:
        self.version, self.device = version, device
        self.args = argparse.Namespace() if args is None else args
        self._settings = settings
        self.hooks: list[Hook] = []
        self.switch_on: Callable[[], None]
        self.parsed: Parsed | None = None
        self.models = 0
        self.store: object = None
        self.chosen_tiles: ChosenTiles | None = None
        self.axis_groups: list[AxisGroups] = []
        self.sums: StepSums | None = None
        self.log_output = Output("--wallfacer-log-metrics")
        self.mtp_group: dist.ProcessGroup | None = None
        self.layer_inputs: LayerInputs | None = None
        self._cp_groups: dict[tuple[int, ...], dist.ProcessGroup] = {}
        self._run = ""

    @property
    def is_on(self) -> bool:
        """Whether the plugin is on."""
        return self._settings is not None

    @property
    def settings(self) -> Settings:
        """Settings of the plugin. A RuntimeError is raised while the plugin is off."""
        if self._settings is None:
            raise RuntimeError("the plugin is off: it has no settings")
        return self._settings

    def turn_on(self, settings: Settings, chosen_tiles: ChosenTiles | None) -> None:
        """Turn the plugin on with its settings. ``chosen_tiles`` is None if no flag is ``auto``."""
        self._settings, self.chosen_tiles = settings, chosen_tiles

    def kernel(self, dtype: torch.dtype, head_dim: int, v_head_dim: int | None = None) -> Kernel:
        """Return the kernel of ``--wallfacer-kernel``. Raise a WallfacerError if that kernel rejects the inputs.

        Query and key heads have ``head_dim`` channels. Value heads have ``v_head_dim`` channels, or ``head_dim``
        channels if ``v_head_dim`` is None.
        """
        with flag_errors():
            return select_kernel(
                self.settings.flags.kernel,
                device=self.device,
                dtype=dtype,
                head_dim=head_dim,
                v_head_dim=v_head_dim,
                window=getattr(self.args, "window_size", None) is not None,
            )

    def connect(self, group: dist.ProcessGroup) -> None:
        """Make the axis groups of every plan inside Megatron's context-parallel group. All ranks must call this method.

        Raises:
            WallfacerError: The size of Megatron's group differs from ``--wallfacer-cp-size``, or a CUDA graph cannot
                contain the group's messages.
        """
        wanted, ranks = self.settings.plan.grid.cp_size, tuple(dist.get_process_group_ranks(group))
        if len(ranks) != wanted:
            raise WallfacerError(
                f"--wallfacer-cp-size {wanted}: Megatron made groups of {len(ranks)} context-parallel ranks"
            )
        options = {
            "timeout": timedelta(minutes=self.args.distributed_timeout_minutes),
            "options": nccl_options(self.args),
        }
        kind = self.settings.flags.transfers
        if self.settings.flags.timeline is not None:
            check_folder("--wallfacer-timeline", Path(self.settings.flags.timeline))
        # Plans with the same grid share its groups. All ranks make the groups in the same order.
        grids = dict.fromkeys(plan.grid for plan in self.settings.plans)
        with flag_errors():
            self.axis_groups = [connected(group, grid, kind, self.device, **options).groups for grid in grids]
        for flag in (FLAG if self.settings.flags.cuda_graphs else None, self.settings.megatron_graphs):
            if flag is not None:
                check_graphs(self.axis_groups[0], os.environ, flag)
        self._cp_groups[ranks] = group
        at_exit(destroy_world)
        if self.settings.flags.timeline is not None:
            self._run = _name_of_run()

    def transfers(self, group: dist.ProcessGroup, grid: Grid) -> Transfers:
        """Return the transfers of a context-parallel group along the axes of a grid.

        Raises:
            WallfacerError: :meth:`connect` was not called for the group.
        """
        ranks = tuple(dist.get_process_group_ranks(group))
        # Look groups up by ranks, because Megatron may pass another object for the same ranks.
        own, kind = self._cp_groups.get(ranks), self.settings.flags.transfers
        transfers = find(own, grid, kind, self.device) if own is not None and is_alive(own) else None
        if transfers is None:
            raise WallfacerError(
                f"attention was built for the context-parallel group {ranks}, which initialize_model_parallel did not "
                "make; --hybrid-context-parallel and hand-made groups are not supported"
            )
        return transfers

    @cached_property
    def documents(self) -> Documents:
        """Reader of document boundaries in packed sequences."""
        shard_mode = "sequence" if shards_whole_sequence(self.args) else "per_document"
        return Documents(self.settings.plan.grid.cp_size, shard_mode)

    @cached_property
    def verified_steps(self) -> VerifiedSteps | None:
        """Counter of verified training steps, or None without ``--wallfacer-verify-every``."""
        every = self.settings.flags.verify_every
        return None if every is None else VerifiedSteps(every)

    @cached_property
    def observer(self) -> Observer:
        """Observer of attention that records each enabled output: timeline, metrics and profiler ranges."""
        return combined(list(self._observers()))

    def _observers(self) -> Iterator[Observer]:
        flags = self.settings.flags
        if flags.timeline is not None:
            origin = TraceSource.here(dist.get_rank(), dist.get_world_size(), self._run, self.device.type)
            yield StepObserver(Path(flags.timeline), origin)
        if flags.log_metrics and (sums := step_sums(self.device)) is not None:
            self.sums = sums
            yield sums
        # Ranges have no effect in a CUDA graph.
        if getattr(self.args, "profile", False) and not flags.cuda_graphs:
            yield Ranges()

    def disconnect(self) -> None:
        """Destroy the axis groups in the same order on all ranks. With NCCL all ranks must call this method."""
        close_groups()
        self.axis_groups.clear()
        self._cp_groups.clear()


def _name_of_run() -> str:
    """Return a unique name of this run, the same name on all ranks. All ranks must call this function."""
    name: list[str] = [uuid.uuid4().hex]
    dist.broadcast_object_list(name, src=0)
    return name[0]
