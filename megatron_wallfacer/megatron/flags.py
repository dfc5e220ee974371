"""Define the plugin's flags. The parser, ``--help`` and docs/flags.md are generated from the class ``Flags``."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from megatron_wallfacer.engine.staged import TRANSFERS
from megatron_wallfacer.errors import OptionError, WallfacerError
from megatron_wallfacer.kernels.select import KERNELS
from megatron_wallfacer.megatron.flag_group import add_flags, flag_specs
from megatron_wallfacer.megatron.releases import FIRST_LAUNCHED, OUTPUT_PROCESSOR
from megatron_wallfacer.schedule.grid import DEFAULT_PLACEMENT
from megatron_wallfacer.schedule.plan import RING_VARIANTS
from megatron_wallfacer.schedule.schemes import PLACEMENTS, SCHEMES

PREFIX = "--wallfacer-"
AUTO = "auto"
#: Fraction of the layers. ``auto`` selects as many layers as fit in host memory.
Fraction = float | Literal["auto"]


def _steps(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ValueError("a positive number of steps")
    return int(text)


def _tiles(text: str) -> int | Literal["auto"]:
    if text == AUTO:
        return AUTO
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"a positive whole number of tiles, or {AUTO}")
    return int(text)


def _fraction(text: str) -> Fraction:
    if text == AUTO:
        return AUTO
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise ValueError("auto, or a fraction of the layers, above 0 and at most 1")
    return value


def _flag(
    default: Any = None,
    *,
    since: tuple[int, int] = FIRST_LAUNCHED,
    values: tuple[str, ...] = (),
    unset: str = "",
    see: str = "",
    in_plan: bool = False,
    **argparse_meta: Any,
) -> Any:
    """Return a dataclass field with the metadata of :mod:`megatron_wallfacer.megatron.flag_group`.

    ``in_plan`` marks an option of :func:`megatron_wallfacer.schedule.schemes.make_plan`.
    """
    about = {"since": since, "values": values, "unset": unset, "see": see, "in_plan": in_plan}
    return field(default=default, metadata=about | {"argparse_meta": argparse_meta})


_FROM_SCHEME = "from the scheme"


@dataclass(frozen=True)
class Flags:
    """Values of the plugin's flags."""

    cp_size: int | None = _flag(metavar="P", unset="the plugin is off")
    """Turn the plugin on with P context-parallel ranks.

    This flag sets ``--context-parallel-size``. Every other flag of the plugin needs this flag.
    """
    scheme: str = _flag("auto", metavar="NAME", values=SCHEMES, see="choosing.md#what-auto-chooses", in_plan=True)
    """Choose the scheme of the grid.

    ``auto`` is the grid ``team x kv_team x ring_outer`` with the least estimated time of one attention layer.
    """
    window_scheme: str | None = _flag(metavar="NAME", unset="scheme of the other layers")
    """Choose the scheme of layers with a sliding window.

    The plugin chooses the axis sizes of that scheme. This flag needs ``--window-size``.
    """
    layers: str | None = _flag(metavar="LAYERS", unset="all")
    """Choose the layers whose attention the plugin computes: ``full``, ``window``, or numbers such as 1,3-8.

    Other layers keep Megatron's own attention, which needs ``--transformer-impl transformer_engine``.
    """
    head_size: int | None = _flag(metavar="U", unset=_FROM_SCHEME, in_plan=True)
    """Set the number of ranks that divide the heads (axis ``head``).

    The number must divide the heads of a tensor-parallel rank.
    """
    team_size: int | None = _flag(metavar="C", unset="least volume; with auto least estimated time", in_plan=True)
    """Set the number of ranks that gather each other's queries (axis ``team``)."""
    kv_team_size: int | None = _flag(metavar="G", unset="from the scheme; with auto least estimated time", in_plan=True)
    """Set the number of ranks that gather each other's keys and values (axis ``kv_team``)."""
    ring_inner_size: int | None = _flag(metavar="W", unset=_FROM_SCHEME, in_plan=True)
    """Set the number of ranks in the inner ring of a double ring."""
    placement: str | None = _flag(
        metavar="ORDER",
        values=tuple(PLACEMENTS),
        unset=",".join(DEFAULT_PLACEMENT),
        see="design.md#grid-and-placement",
        in_plan=True,
    )
    """Set the order of the axes over the ranks: axes such as ``team,ring``, fastest varying first, or a name."""
    kv_order: str | None = _flag(
        metavar="ORDER",
        values=("native", "paper", "permuted"),
        unset="paper with scheme wallfacer, else native",
        see="design.md#the-published-order",
        in_plan=True,
    )
    """Set the order of the first K and V blocks.

    ``paper`` is the published order. ``permuted`` sends the same blocks with less volume.
    """
    forward: str = _flag("auto", metavar="VARIANT", values=("auto", *RING_VARIANTS), in_plan=True)
    """Choose the ring variant of the forward pass.

    ``auto`` is the published variant, or the variant with less volume where the scheme leaves it open.
    """
    backward: str = _flag("auto", metavar="VARIANT", values=("auto", *RING_VARIANTS), in_plan=True)
    """Choose the ring variant of the backward pass."""
    bidirectional: bool = _flag(False, in_plan=True)
    """Send blocks half way around the ring in each direction.

    This flag needs a single ring.
    """
    head_groups: int | None = _flag(
        metavar="N", unset="2 if rows are gathered and calls of half the heads are large, else 1", in_plan=True
    )
    """Set the number of head groups. One head group computes while another communicates.

    The default is 2 with an axis ``head`` or ``team`` and at least 16,384 tokens per rank at 32 query heads
    (tokens² x heads >= 2³³).
    """
    kernel: str = _flag("auto", metavar="NAME", values=KERNELS, see="kernels.md")
    """Choose the attention kernel of one tile.

    This flag replaces ``--attention-backend``.
    """
    keep_gathered_q: bool = _flag(False)
    """Keep gathered queries for backward instead of gathering them again."""
    keep_attention_output: bool = _flag(False, see="memory.md#recomputation")
    """Keep attention outputs where Megatron recomputes layers, so that backward does not run attention again.

    This flag needs recomputation of attention.
    """
    transfers: str = _flag(
        "direct", metavar="PATH", values=TRANSFERS, choices=TRANSFERS, see="gpu.md#several-ranks-on-one-gpu"
    )
    """Choose the path of messages.

    ``staged`` sends messages through host memory over gloo, so that ranks can share a GPU with NCCL before 2.30.
    """
    cuda_graphs: bool = _flag(False, see="gpu.md#cuda-graphs")
    """Run passes of attention as CUDA graphs, on GPUs with NCCL.

    This flag has not run on a GPU yet.
    """
    loss_tiles: int | Literal["auto"] | None = _flag(
        metavar="N", type=_tiles, since=OUTPUT_PROCESSOR, unset="1", see="memory.md#tiles-of-tokens"
    )
    """Compute head and loss in N tiles of tokens, each recomputed in backward; or ``auto``.

    Logits exist for one tile at a time. ``auto`` is the smallest number that lowers the peak of memory.
    """
    mlp_tiles: int | Literal["auto"] | None = _flag(
        metavar="N", type=_tiles, unset="1", see="memory.md#tiles-of-tokens"
    )
    """Compute dense MLPs in N tiles of tokens, each recomputed in backward; or ``auto``."""
    keep_on_host: float | Literal["auto"] | None = _flag(
        metavar="FRACTION", type=_fraction, unset="none", see="memory.md#host-memory"
    )
    """Keep attention outputs of this part of the layers in host memory; or ``auto``.

    ``auto`` is as many layers as host memory has room for. This flag needs ``--wallfacer-keep-attention-output``.
    It has not run on a GPU yet.
    """
    layer_inputs_on_host: float | Literal["auto"] | None = _flag(
        metavar="FRACTION", type=_fraction, unset="none", see="memory.md#host-memory"
    )
    """Keep inputs of this part of the layers in host memory; or ``auto``.

    This flag needs ``--recompute-granularity full``. It has not run on a GPU yet.
    """
    verify_every: int | None = _flag(metavar="N", type=_steps, unset="off", see="reliability.md#verified-steps")
    """Compare every message of attention with its source in every Nth step.

    A difference names sender, axis, tensor and layer, and stops all ranks. Verified steps run without CUDA graphs.
    """
    timeline: str | None = _flag(metavar="DIR", unset="off", see="seeing.md#timelines")
    """Write a timeline of attention in the second step to a folder, one file per rank.

    This flag needs ``--train-iters`` 2 or more.
    """
    log_metrics: bool = _flag(False, see="seeing.md#metrics-of-each-step")
    """Log times and bytes of attention to TensorBoard or Weights & Biases.

    This flag needs ``--tensorboard-dir`` or ``--wandb-project``. It times each pass and each wait.
    """
    cluster: str | None = _flag(metavar="FILE", unset="scheme auto without a cluster", see="planning.md")
    """Choose the fastest grid for a cluster, given by its name, its file, or ``hosts`` for the nodes of the job.

    Flags that set scheme, axes and other choices of a grid must be left out.
    """

    @classmethod
    def of(cls, args: argparse.Namespace) -> Flags:
        """Return the flags in parsed arguments, with the default for each flag that the arguments lack."""
        return cls(**{spec.field: getattr(args, spec.dest, spec.default) for spec in FLAGS})

    def is_on(self) -> bool:
        """Return whether the plugin is on.

        Raises:
            WallfacerError: A flag is given without ``--wallfacer-cp-size``.
        """
        if self.cp_size is None:
            for spec in FLAGS:
                value = getattr(self, spec.field)
                if value != spec.default:
                    raise WallfacerError(f"{spec.typed(value)}: needs {PREFIX}cp-size P")
        return self.cp_size is not None


FLAGS = flag_specs(Flags, PREFIX)
#: Flags that are options of ``make_plan``, by name.
PLAN_OPTIONS = tuple(one.name for one in fields(Flags) if one.metadata["in_plan"])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the plugin's flags to Megatron's parser."""
    add_flags(parser, FLAGS, "wallfacer", "context parallelism on multi-dimensional rings")


def flag_name(option: str) -> str:
    """Return the flag of an option, such as ``--wallfacer-team-size`` for ``team_size``."""
    return PREFIX + option.replace("_", "-")


@contextmanager
def flag_errors(where: str = "") -> Iterator[None]:
    """Replace an OptionError by a WallfacerError that begins with ``where`` and the flag of the option."""
    try:
        yield
    except OptionError as error:
        raise WallfacerError(f"{where}{flag_name(error.option)} {error.value}: must be {error.allowed}") from error


KEEP, INPUTS = flag_name("keep_on_host"), flag_name("layer_inputs_on_host")
