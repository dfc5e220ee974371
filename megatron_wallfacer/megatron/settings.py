"""Settings of a run: the plugin's flags, and the plans that follow from them and Megatron's arguments."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field, replace

from megatron_wallfacer.errors import OptionError, WallfacerError
from megatron_wallfacer.megatron.flags import PLAN_OPTIONS, PREFIX, Flags, as_flag_error, flag_name
from megatron_wallfacer.megatron.layer_selection import LayerSelection, select_layers
from megatron_wallfacer.megatron.megatron_graphs import attention_in_graphs
from megatron_wallfacer.megatron.model_shape import dtype_of, head_dim, heads_per_rank, shape_of
from megatron_wallfacer.megatron.planned import planned
from megatron_wallfacer.planning.choice import Choice
from megatron_wallfacer.schedule.plan import Plan
from megatron_wallfacer.schedule.price import NODE
from megatron_wallfacer.schedule.schemes import make_plan


@dataclass(frozen=True)
class Settings:
    """Settings of a run with the plugin on.

    Attributes:
        plan: plan of layers without a sliding window, and of all layers without a window plan.
        flags: values of the flags. The planner may have chosen ``keep_gathered_q``, and tiles are numbers once
            :func:`megatron_wallfacer.megatron.auto_tiles.choose_tiles` has replaced ``auto``.
        window_plan: plan of layers with a sliding window; None for the same plan.
        layers: layers whose attention the plugin computes; None for all layers.
        megatron_graphs: flag of Megatron's CUDA graphs that hold attention, as typed; None if none do.
        overlapped_bytes: bytes that a device copies to the host during attention's forward pass of one layer, as
            predicted for ``--wallfacer-cluster``; None without it, or where the cluster has no ``host_link``.
    """

    plan: Plan
    flags: Flags = field(default_factory=Flags)
    window_plan: Plan | None = None
    layers: LayerSelection | None = None
    megatron_graphs: str | None = None
    overlapped_bytes: float | None = None

    @property
    def plans(self) -> tuple[Plan, ...]:
        """Every plan that some layer may have."""
        return (self.plan,) if self.window_plan is None else (self.plan, self.window_plan)

    def plan_of(self, *, window: bool) -> Plan:
        """Return the plan of a layer with, or without, a sliding window."""
        return self.window_plan if window and self.window_plan is not None else self.plan


def settings_from(args: argparse.Namespace) -> Settings:
    """Return the settings of a run with the plugin on.

    Args:
        args: Megatron's arguments as parsed, before Megatron validates them.

    Raises:
        WallfacerError: one line naming the flag, its value and what is allowed.
    """
    flags = Flags.of(args)
    if args.num_attention_heads is None:
        raise WallfacerError(
            f"--num-attention-heads: must be on the command line with {PREFIX}cp-size, which plans from it "
            "before --use-checkpoint-args has read a checkpoint"
        )
    overlapped = None
    if flags.cluster is None:
        plan = _plan_by_hand(flags, args)
    else:
        choice = _planned(flags, args)
        if (link := choice.job.cluster.host_link) is not None:
            overlapped = choice.simulation.pass_s[0] * link * 1e9
        plan, flags = choice.plan, replace(flags, keep_gathered_q=choice.keep_gathered_q)
    _check(flags, args)
    return Settings(plan, flags, _window_plan(flags, args), select_layers(args), attention_in_graphs(args), overlapped)


def _check(flags: Flags, args: argparse.Namespace) -> None:
    """Check what flags need of Megatron's arguments.

    Raises:
        WallfacerError: An argument is missing.
    """
    if flags.timeline is not None and getattr(args, "train_iters", None) == 1:
        raise WallfacerError(f"{flag_name('timeline')} {flags.timeline}: needs --train-iters 2 or more, not 1")
    writers = ("tensorboard_dir", "wandb_project")
    if flags.log_metrics and not any(getattr(args, name, None) for name in writers):
        raise WallfacerError(f"{flag_name('log_metrics')}: needs --tensorboard-dir DIR or --wandb-project NAME")


def _planned(flags: Flags, args: argparse.Namespace) -> Choice:
    """Return the choice of the planner for ``--wallfacer-cluster``."""
    if args.seq_length is None or head_dim(args) is None:
        raise WallfacerError(
            f"{flag_name('cluster')} {flags.cluster}: needs --seq-length and --hidden-size on the command line"
        )
    return planned(flags, args.tensor_model_parallel_size, shape_of(args, dtype_of(args)))


def _plan_by_hand(flags: Flags, args: argparse.Namespace) -> Plan:
    options = {name: getattr(flags, name) for name in PLAN_OPTIONS}
    try:
        return make_plan(cp_size=flags.cp_size, **options, **_sizes(flags, args))
    except OptionError as error:
        raise as_flag_error(error) from error


def _window_plan(flags: Flags, args: argparse.Namespace) -> Plan | None:
    """Return the plan of layers with a sliding window; None if it is the plan of the others."""
    name, option = flags.window_scheme, flag_name("window_scheme")
    if name is None:
        return None
    if getattr(args, "window_size", None) is None:
        raise WallfacerError(f"{option} {name}: needs --window-size LEFT,RIGHT")
    try:
        return make_plan(name, flags.cp_size, **_sizes(flags, args))
    except OptionError as error:
        subject = "" if error.option == "scheme" else f"{error.option.replace('_', ' ')} {error.value} "
        raise WallfacerError(f"{option} {name}: {subject}must be {error.allowed}") from error


def _sizes(flags: Flags, args: argparse.Namespace) -> dict[str, int]:
    """Return heads and tokens per rank, and ranks of the context-parallel group per node."""
    q_heads, k_heads = heads_per_rank(args)
    return {
        "q_heads": q_heads,
        "kv_heads": k_heads,
        # The number of ranks is checked later.
        "tokens": args.seq_length // max(1, flags.cp_size),
        "ranks_per_node": NODE // args.tensor_model_parallel_size,
    }
