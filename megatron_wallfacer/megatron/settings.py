"""Derive the settings and plans of a run from the plugin's flags and Megatron's arguments."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field, replace

from megatron_wallfacer.errors import OptionError, WallfacerError
from megatron_wallfacer.megatron.flags import PLAN_OPTIONS, PREFIX, Flags, flag_errors, flag_name
from megatron_wallfacer.megatron.layer_selection import LayerSelection, select_layers
from megatron_wallfacer.megatron.megatron_graphs import attention_in_graphs
from megatron_wallfacer.megatron.model_shape import heads_per_rank
from megatron_wallfacer.megatron.planned import planned
from megatron_wallfacer.schedule.plan import Plan
from megatron_wallfacer.schedule.price import NODE
from megatron_wallfacer.schedule.schemes import make_plan


@dataclass(frozen=True)
class Settings:
    """Settings of a run with the plugin on.

    Attributes:
        plan: plan of layers without a sliding window, or of all layers if ``window_plan`` is None.
        flags: values of the flags. The planner may choose ``keep_gathered_q``. The function
            :func:`megatron_wallfacer.megatron.auto_tiles.choose_tiles` replaces ``auto`` by a number of tiles.
        window_plan: plan of layers with a sliding window, or None to use ``plan``.
        layers: layers whose attention the plugin computes, or None for all layers.
        megatron_graphs: flag, as typed, that puts attention into Megatron's CUDA graphs, or None.
        overlapped_bytes: predicted bytes that a device copies to the host while attention computes the forward pass of
            one layer. None without ``--wallfacer-cluster`` or if the cluster has no ``host_link``.
    """

    plan: Plan
    flags: Flags = field(default_factory=Flags)
    window_plan: Plan | None = None
    layers: LayerSelection | None = None
    megatron_graphs: str | None = None
    overlapped_bytes: float | None = None

    @property
    def plans(self) -> tuple[Plan, ...]:
        """Plans of all layers."""
        return (self.plan,) if self.window_plan is None else (self.plan, self.window_plan)

    def plan_of(self, *, window: bool) -> Plan:
        """Return the plan of a layer with, or without, a sliding window."""
        return self.window_plan if window and self.window_plan is not None else self.plan


def settings_from(args: argparse.Namespace) -> Settings:
    """Return the settings of a run with the plugin on, from Megatron's arguments before Megatron validates them.

    Raises:
        WallfacerError: A flag has an invalid value, or an argument that the flag needs is missing.
    """
    flags = Flags.of(args)
    if args.num_attention_heads is None:
        raise WallfacerError(
            f"--num-attention-heads: must be on the command line with {PREFIX}cp-size, because the plugin chooses the "
            "grid before --use-checkpoint-args reads a checkpoint"
        )
    overlapped = None
    if flags.cluster is None:
        plan = _plan_by_hand(flags, args)
    else:
        choice = planned(flags, args)
        if (link := choice.job.cluster.host_link) is not None:
            overlapped = choice.simulation.pass_s[0] * link * 1e9
        plan, flags = choice.plan, replace(flags, keep_gathered_q=choice.keep_gathered_q)
    _check(flags, args)
    return Settings(plan, flags, _window_plan(flags, args), select_layers(args), attention_in_graphs(args), overlapped)


def _check(flags: Flags, args: argparse.Namespace) -> None:
    if flags.timeline is not None and getattr(args, "train_iters", None) == 1:
        raise WallfacerError(f"{flag_name('timeline')} {flags.timeline}: needs --train-iters 2 or more, not 1")
    writers = ("tensorboard_dir", "wandb_project")
    if flags.log_metrics and not any(getattr(args, name, None) for name in writers):
        raise WallfacerError(f"{flag_name('log_metrics')}: needs --tensorboard-dir DIR or --wandb-project NAME")


def _plan_by_hand(flags: Flags, args: argparse.Namespace) -> Plan:
    options = {name: getattr(flags, name) for name in PLAN_OPTIONS}
    with flag_errors():
        return make_plan(cp_size=flags.cp_size, **options, **_sizes(flags, args))


def _window_plan(flags: Flags, args: argparse.Namespace) -> Plan | None:
    """Return the plan of layers with a sliding window, or None without ``--wallfacer-window-scheme``."""
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
    """Return heads per rank, tokens per rank, and the number of context-parallel ranks per node."""
    q_heads, k_heads = heads_per_rank(args)
    return {
        "q_heads": q_heads,
        "kv_heads": k_heads,
        # The number of ranks is checked later.
        "tokens": args.seq_length // max(1, flags.cp_size),
        "ranks_per_node": NODE // args.tensor_model_parallel_size,
    }
