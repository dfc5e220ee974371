"""The plugin's flags, and what they mean together with Megatron's own."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_wallfacer.engine.staged import TRANSFERS
from megatron_wallfacer.errors import OptionError, WallfacerError
from megatron_wallfacer.kernels.protocol import accumulation_dtype
from megatron_wallfacer.kernels.select import KERNELS
from megatron_wallfacer.megatron.host_memory.flags import INPUTS, KEEP, Fraction, fraction_of
from megatron_wallfacer.megatron.layer_selection import LayerSelection, select_layers
from megatron_wallfacer.megatron.megatron_graphs import attention_in_graphs
from megatron_wallfacer.megatron.planned import planned
from megatron_wallfacer.megatron.tile_flags import LOSS, MLP, tiles_of
from megatron_wallfacer.megatron.verified import VERIFY, verify_every_of
from megatron_wallfacer.planning.choice import Choice
from megatron_wallfacer.schedule.plan import Plan
from megatron_wallfacer.schedule.price import NODE
from megatron_wallfacer.schedule.schemes import PLACEMENTS, SCHEMES, make_plan
from megatron_wallfacer.schedule.volume import Shape

PREFIX = "--wallfacer-"
NUMBERS = ("cp_size", "head_size", "team_size", "kv_team_size", "ring_inner_size", "head_groups", "verify_every")


@dataclass(frozen=True)
class Settings:
    """What the flags ask for, resolved.

    Attributes:
        plan: grid and choices.
        kernel: name of the local kernel, ``auto`` for the device's own.
        keep_gathered_q: save the team's queries for backward.
        timeline: folder for a time line of one step; None for none.
        keep_attention_output: do not run attention again where Megatron recomputes it.
        window_plan: of layers with a sliding window; None for that of the others.
        log_metrics: write attention's times and bytes where Megatron writes its own.
        transfers: ``direct``, or ``staged`` through host memory.
        layers: layers whose attention the plugin computes; None for all.
        cuda_graphs: run passes as CUDA graphs.
        loss_tiles: tiles of tokens of the head and loss; None for all tokens at once.
        mlp_tiles: tiles of tokens of each dense MLP; None for all tokens at once.
        megatron_graphs: flag by which Megatron's CUDA graphs hold attention, as typed; None where they do not.
        verify_every: steps from one whose messages are verified to the next; None for none.
        keep_on_host: part of the layers whose kept attention output is in host memory; None for none.
        layer_inputs_on_host: part of the layers whose input is in host memory; None for none.
    """

    plan: Plan
    kernel: str
    keep_gathered_q: bool
    timeline: Path | None = None
    keep_attention_output: bool = False
    window_plan: Plan | None = None
    log_metrics: bool = False
    transfers: str = "direct"
    layers: LayerSelection | None = None
    cuda_graphs: bool = False
    loss_tiles: int | None = None
    mlp_tiles: int | None = None
    megatron_graphs: str | None = None
    verify_every: int | None = None
    keep_on_host: Fraction | None = None
    layer_inputs_on_host: Fraction | None = None

    @property
    def plans(self) -> tuple[Plan, ...]:
        """Every plan that some layer may have."""
        return (self.plan,) if self.window_plan is None else (self.plan, self.window_plan)

    def plan_of(self, *, window: bool) -> Plan:
        """The plan of a layer with, or without, a sliding window."""
        return self.window_plan if window and self.window_plan is not None else self.plan


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the plugin's flags to Megatron's parser. Values are checked later, so that each error is one line."""
    group = parser.add_argument_group("wallfacer", "context parallelism on multi-dimensional rings")
    add = group.add_argument
    add(f"{PREFIX}cp-size", metavar="P", help="turn it on with P ranks; sets --context-parallel-size")
    add(f"{PREFIX}scheme", default="auto", help=f"one of {', '.join(SCHEMES)} (default: auto)")
    add(f"{PREFIX}window-scheme", metavar="NAME", help="scheme of layers with a sliding window, its axes not by hand")
    add(f"{PREFIX}layers", metavar="LAYERS", help="full, window, or 1,3-8; others keep Megatron's (default: all)")
    add(f"{PREFIX}head-size", metavar="U", help="ranks that divide heads (default: from the scheme)")
    add(f"{PREFIX}team-size", metavar="C", help="ranks that share queries (default: fewest words; auto: lowest price)")
    add(f"{PREFIX}kv-team-size", metavar="G", help="ranks that share keys and values (default: from the scheme)")
    add(
        f"{PREFIX}ring-inner-size",
        metavar="W",
        help="ranks of the inner ring of a double ring (default: from the scheme)",
    )
    add(f"{PREFIX}placement", help=f"{', '.join(PLACEMENTS)}, or an axis order, fastest first")
    add(f"{PREFIX}kv-order", help="blocks as published: paper, or permuted to move less; else native")
    add(f"{PREFIX}forward", default="auto", help="ring variant in forward: pass-kv, pass-q or auto")
    add(f"{PREFIX}backward", default="auto", help="ring variant in backward: pass-kv, pass-q or auto")
    add(f"{PREFIX}bidirectional", action="store_true", help="blocks go half way round the ring in each direction")
    add(f"{PREFIX}head-groups", metavar="N", help="groups of heads that are pipelined (default: 2 with head or team)")
    add(f"{PREFIX}kernel", default="auto", help=f"local attention kernel: {', '.join(KERNELS)} (default: auto)")
    add(f"{PREFIX}keep-gathered-q", action="store_true", help="keep the team's queries instead of gathering them twice")
    add(f"{PREFIX}keep-attention-output", action="store_true", help="recompute layers, but not their attention")
    add(
        f"{PREFIX}transfers",
        choices=TRANSFERS,
        default="direct",
        help="staged: through host memory over gloo, so that several ranks may share a GPU (default: direct)",
    )
    add(f"{PREFIX}cuda-graphs", action="store_true", help="run attention's passes as CUDA graphs, on GPUs with NCCL")
    add(
        LOSS,
        metavar="N",
        help="head and loss in N tiles of tokens, recomputed in backward, or auto (default: one tile)",
    )
    add(MLP, metavar="N", help="dense MLPs in N tiles of tokens, recomputed in backward, or auto (default: one tile)")
    add(KEEP, metavar="FRACTION", help="keep attention outputs of this part of the layers in host memory, or auto")
    add(INPUTS, metavar="FRACTION", help="the same for layer inputs, with --recompute-granularity full")
    add(VERIFY, metavar="N", help="compare every message with its source in every Nth step (default: off)")
    add(f"{PREFIX}timeline", metavar="DIR", help="write there, for each rank, what attention did in the second step")
    add(
        f"{PREFIX}log-metrics",
        action="store_true",
        help="log attention's times and bytes to TensorBoard or W&B (default: off, it times each pass and each wait)",
    )
    add(
        f"{PREFIX}cluster",
        metavar="FILE",
        help="a cluster by name or YAML file, or hosts, the job's own: auto is the grid that is fastest there",
    )


def read_numbers(args: argparse.Namespace) -> None:
    """Turn our numeric flags into ints, in place. argparse would print Megatron's whole usage for a bad one.

    Raises:
        WallfacerError: one is not a whole number.
    """
    for name in NUMBERS:
        text = getattr(args, f"wallfacer_{name}", None)
        try:
            setattr(args, f"wallfacer_{name}", None if text is None else int(text))
        except ValueError:
            raise WallfacerError(f"{flag(name)} {text}: must be a whole number") from None


def is_on(args: argparse.Namespace) -> bool:
    """Whether the plugin was asked for.

    Raises:
        WallfacerError: it was not, but one of its other flags was.
    """
    if getattr(args, "wallfacer_cp_size", None) is not None:
        return True
    defaults = _defaults()
    for name, default in vars(defaults).items():
        if getattr(args, name, default) != default:
            raise WallfacerError(f"--{name.replace('_', '-')} {getattr(args, name)}: needs {PREFIX}cp-size P beside it")
    return False


def settings_from(args: argparse.Namespace) -> Settings:
    """The settings of a run in which the plugin is on.

    Raises:
        WallfacerError: one line naming the flag, its value and what is allowed.
    """
    if args.num_attention_heads is None:
        raise WallfacerError(
            f"--num-attention-heads: must be on the command line with {PREFIX}cp-size, which plans from it "
            "before --use-checkpoint-args has read a checkpoint"
        )
    keep_gathered_q = args.wallfacer_keep_gathered_q
    if args.wallfacer_cluster is None:
        plan = _plan_by_hand(args)
    else:
        choice = _planned(args)
        plan, keep_gathered_q = choice.plan, choice.keep_gathered_q
    return Settings(
        plan,
        args.wallfacer_kernel,
        keep_gathered_q,
        _timeline(args),
        args.wallfacer_keep_attention_output,
        _window_plan(args),
        _log_metrics(args),
        args.wallfacer_transfers,
        select_layers(args),
        args.wallfacer_cuda_graphs,
        tiles_of(args, LOSS),
        tiles_of(args, MLP),
        attention_in_graphs(args),
        verify_every_of(args),
        fraction_of(args, KEEP),
        fraction_of(args, INPUTS),
    )


def share_gpus(args: argparse.Namespace, device: torch.device) -> None:
    """Where a host has more ranks than GPUs: Megatron would take the GPU of a rank's number on its host."""
    if device.type == "cuda":
        args.local_rank %= torch.cuda.device_count()


def _timeline(args: argparse.Namespace) -> Path | None:
    """Where a time line is to be written, if one is."""
    if args.wallfacer_timeline is None:
        return None
    if getattr(args, "train_iters", None) == 1:
        raise WallfacerError(f"{flag('timeline')} {args.wallfacer_timeline}: needs --train-iters 2 or more, not 1")
    return Path(args.wallfacer_timeline)


def _log_metrics(args: argparse.Namespace) -> bool:
    """Whether metrics are asked for; Megatron must write its own somewhere then."""
    writers = ("tensorboard_dir", "wandb_project")
    if args.wallfacer_log_metrics and not any(getattr(args, name, None) for name in writers):
        raise WallfacerError(f"{flag('log_metrics')}: needs --tensorboard-dir DIR or --wandb-project NAME beside it")
    return args.wallfacer_log_metrics


def _planned(args: argparse.Namespace) -> Choice:
    """What the planner chooses for ``--wallfacer-cluster``."""
    if args.seq_length is None or head_dim(args) is None:
        raise WallfacerError(
            f"{flag('cluster')} {args.wallfacer_cluster}: needs --seq-length and --hidden-size on the command line"
        )
    return planned(args, shape_of(args, dtype_of(args)))


def _plan_by_hand(args: argparse.Namespace) -> Plan:
    q_heads, k_heads = heads_at_hand(args)
    try:
        return make_plan(
            args.wallfacer_scheme,
            args.wallfacer_cp_size,
            head_size=args.wallfacer_head_size,
            team_size=args.wallfacer_team_size,
            kv_team_size=args.wallfacer_kv_team_size,
            ring_inner_size=args.wallfacer_ring_inner_size,
            placement=args.wallfacer_placement,
            kv_order=args.wallfacer_kv_order,
            forward=args.wallfacer_forward,
            backward=args.wallfacer_backward,
            bidirectional=args.wallfacer_bidirectional,
            head_groups=args.wallfacer_head_groups,
            q_heads=q_heads,
            kv_heads=k_heads,
            tokens=_rank_tokens(args),
            ranks_per_node=NODE // args.tensor_model_parallel_size,
        )
    except OptionError as error:
        raise as_flag_error(error) from error


def _window_plan(args: argparse.Namespace) -> Plan | None:
    """The plan of layers with a sliding window, where it is not that of the others."""
    name, option = args.wallfacer_window_scheme, "window_scheme"
    if name is None:
        return None
    if getattr(args, "window_size", None) is None:
        raise WallfacerError(f"{flag(option)} {name}: needs --window-size LEFT,RIGHT beside it")
    q_heads, k_heads = heads_at_hand(args)
    try:
        size = args.wallfacer_cp_size
        node = NODE // args.tensor_model_parallel_size
        heads = {"q_heads": q_heads, "kv_heads": k_heads}
        return make_plan(name, size, **heads, tokens=_rank_tokens(args), ranks_per_node=node)
    except OptionError as error:
        whose = "must be" if error.option == "scheme" else f"{error.option.replace('_', ' ')} {error.value} must be"
        raise WallfacerError(f"{flag(option)} {name}: {whose} {error.allowed}") from error


def _rank_tokens(args: argparse.Namespace) -> int:
    """Tokens per rank. The number of ranks is checked later."""
    return args.seq_length // max(1, args.wallfacer_cp_size)


def kv_heads(args: argparse.Namespace) -> int:
    """Key/value heads of the model: Megatron's --num-query-groups counts only with --group-query-attention.

    Latent attention (MLA) makes keys and values for every query head.
    """
    if _is_latent(args):
        return args.num_attention_heads
    return args.num_query_groups if args.group_query_attention else args.num_attention_heads


def shape_of(args: argparse.Namespace, dtype: torch.dtype) -> Shape:
    """One rank's shard of one layer, from Megatron's arguments."""
    q_heads, k_heads = heads_at_hand(args)
    return Shape(
        tokens=args.seq_length // args.wallfacer_cp_size,
        q_heads=q_heads,
        kv_heads=k_heads,
        head_dim=head_dim(args),
        v_head_dim=v_head_dim(args),
        batch=args.micro_batch_size or 1,
        itemsize=dtype.itemsize,
        accumulate_itemsize=accumulation_dtype(dtype).itemsize,
    )


def heads_at_hand(args: argparse.Namespace) -> tuple[int, int]:
    """(q heads, kv heads) of one rank; tensor parallelism leaves at least one kv head to each."""
    parallel = args.tensor_model_parallel_size
    return max(1, args.num_attention_heads // parallel), max(1, kv_heads(args) // parallel)


def head_dim(args: argparse.Namespace) -> int | None:
    """Channels of a head's queries and keys, or None where the command line leaves the sizes to a checkpoint."""
    if _is_latent(args):
        return args.qk_head_dim + args.qk_pos_emb_head_dim
    if args.kv_channels is not None:
        return args.kv_channels
    return None if args.hidden_size is None else args.hidden_size // args.num_attention_heads


def v_head_dim(args: argparse.Namespace) -> int | None:
    """Channels of a head's values, or None where they are as many as those of its keys."""
    return args.v_head_dim if _is_latent(args) else None


def _is_latent(args: argparse.Namespace) -> bool:
    return getattr(args, "multi_latent_attention", False)


def dtype_of(args: argparse.Namespace) -> torch.dtype:
    """The dtype in which attention gets its inputs."""
    if args.bf16:
        return torch.bfloat16
    return torch.float16 if args.fp16 else torch.float32


def flag(option: str) -> str:
    """``team_size`` -> ``--wallfacer-team-size``."""
    return PREFIX + option.replace("_", "-")


def as_flag_error(error: OptionError) -> WallfacerError:
    """Return an error of an option as an error of its flag."""
    return WallfacerError(f"{flag(error.option)} {error.value}: must be {error.allowed}")


def _defaults() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args([])
