"""``wallfacer plan``: which grid for this model on this cluster, and why."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_wallfacer.cli.outputs import check_output
from megatron_wallfacer.cli.simulate import add_job_arguments, token_count
from megatron_wallfacer.cli.table import as_json, figure, show_table
from megatron_wallfacer.errors import OptionError
from megatron_wallfacer.schedule.grid import AXES

if TYPE_CHECKING:
    from megatron_wallfacer.planning.cluster import Cluster
    from megatron_wallfacer.planning.model import Model
    from megatron_wallfacer.planning.parallel import Software, Spread
    from megatron_wallfacer.planning.search import Choice, Found, Job

#: Rows of the table.
BEST = 10


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add ``plan``."""
    parser = commands.add_parser("plan", help="find the fastest grid for a model on a cluster, and say why")
    add_job_arguments(parser)
    parser.add_argument("--cuda-graphs", action="store_true", help="count what --wallfacer-cuda-graphs holds")
    parser.add_argument("--save", type=Path, metavar="FILE", help="write the best one's flags as a preset")
    parser.add_argument("--trace", type=Path, metavar="FILE", help="write a layer of the best one as a Perfetto trace")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the best and the named schemes")
    parser.add_argument("--scaling", type=Path, metavar="FILE", help="instead: 64 to 65,536 such devices, drawn there")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run_plan)


@dataclass(frozen=True)
class Row:
    """A line of the table. Times of one attention layer, forward and backward.

    Attributes:
        name: of a scheme, or empty.
        grid, placement, riders, q_kept: the plan.
        seconds: played; None where that would take long.
        bound_s: below which no overlap can bring it.
        buffers_gb: of attention: buffers and results.
        tokens_s, mfu, memory_gb: of a whole step.
        reason: what its time is made of.
    """

    name: str
    grid: str
    placement: tuple[str, ...]
    riders: tuple[str, str]
    q_kept: bool
    seconds: float | None
    bound_s: float
    buffers_gb: float | None
    tokens_s: float | None
    mfu: float | None
    memory_gb: float | None
    reason: str


def run_plan(arguments: argparse.Namespace) -> int:
    """Search, print, and write what was asked for.

    Raises:
        OptionError: nothing fits; with the nearest that does.
        WallfacerError: a file cannot be written.
    """
    from megatron_wallfacer.planning.inventory import peak
    from megatron_wallfacer.planning.layer import attention_job
    from megatron_wallfacer.planning.load import load_cluster
    from megatron_wallfacer.planning.model import model_named
    from megatron_wallfacer.planning.parallel import Software, spread_over
    from megatron_wallfacer.planning.rank_memory import rank_buffers
    from megatron_wallfacer.planning.search import named, search

    for name in ("save", "trace", "plot", "scaling"):
        check_output(f"--{name}", getattr(arguments, name))
    cluster = load_cluster(arguments.cluster, arguments.nodes)
    if arguments.scaling:
        return _scaling(arguments, cluster)
    model = model_named(arguments.model)
    software, tokens = Software(), token_count(arguments.seq)
    spread = spread_over(cluster, tp=arguments.tp, pp=arguments.pp, cp=arguments.cp)
    job = attention_job(model, cluster, tokens, spread, causal=not arguments.full_mask, software=software)
    job = replace(job, cuda_graphs=arguments.cuda_graphs)
    _check_rest(model, job, spread, software)

    def needs(choice: Choice) -> float:
        return peak(rank_buffers(model, job.shape.tokens, choice.attention, spread, software))[1]

    found = search(job, memory_bytes=1e9 * cluster.device.memory_gb, needs=needs)
    others = list(named(job))
    best = [_row(model, one, spread, software) for one in _in_best_placement(found)[:BEST]]
    corners = [_row(model, one, spread, software) for one in others]
    if arguments.json:
        print(json.dumps({"best": [asdict(row) for row in best], "named": [asdict(row) for row in corners]}, indent=2))
    else:
        print(f"{cluster}\n{model.name}, {tokens:,} tokens; {_groups(spread)}; of one attention layer both passes\n")
        _show([*best, *corners])
        print(f"\n{_summary(found, job)}")
    _write(arguments, found.best[0], best, corners, spread)
    return 0


def _scaling(arguments: argparse.Namespace, cluster: Cluster) -> int:
    from megatron_wallfacer.cli.pictures.plans import draw_scaling
    from megatron_wallfacer.cli.scaling import TOKENS_EACH, points, show

    found = list(points(cluster))
    if arguments.json:
        print(as_json(found))
    else:
        show(found)
    lines: dict[str, list[tuple[int, float, float, str]]] = {}
    for point in found:
        lines.setdefault(point.line, []).append((point.devices, point.seconds, point.kernel_s, point.grid))
    title = f"One attention layer on {cluster.name} and larger, {TOKENS_EACH:,} tokens a device, causal"
    draw_scaling(arguments.scaling, lines, title)
    return 0


def _show(rows: Iterable[Row]) -> None:
    """One line a row; grids that were found have no name."""
    headings = ("scheme", "grid", ">ms", ">bound", ">MFU %", ">buffers GB", "why", "nearest first")
    lines = (
        (
            row.name or "-",
            row.grid,
            figure(None if row.seconds is None else 1000.0 * row.seconds),
            figure(1000.0 * row.bound_s),
            figure(None if row.mfu is None else 100 * row.mfu, 1),
            figure(row.buffers_gb),
            row.reason,
            ", ".join(row.placement),
        )
        for row in rows
    )
    show_table(headings, lines)


def _in_best_placement(found: Found) -> list[Choice]:
    """One choice of each grid, in its best placement."""
    first: dict[tuple[int, ...], Choice] = {}
    for choice in found.best:
        first.setdefault(tuple(choice.plan.grid.size_of(axis) for axis in AXES), choice)
    return list(first.values())


def flags_of(choice: Choice) -> dict[str, str | int | bool]:
    """The plugin's flags for a choice, as Megatron's tests write them in YAML."""
    plan = choice.plan
    grid = plan.grid
    scheme = choice.name or "team-ring"
    flags: dict[str, str | int | bool] = {"--wallfacer-cp-size": grid.cp_size, "--wallfacer-scheme": scheme}
    if choice.name:
        # What a name fixes need not be said, and may not be; its axes were chosen by it.
        return flags | ({"--wallfacer-placement": ",".join(grid.placement)} if len(grid.placement) > 1 else {})
    for axis, flag in (("head", "head-size"), ("team", "team-size"), ("ring_inner", "ring-window")):
        flags[f"--wallfacer-{flag}"] = grid.size_of(axis)
    if len(grid.placement) > 1:
        flags["--wallfacer-placement"] = ",".join(grid.placement)
    flags |= {"--wallfacer-forward": plan.forward, "--wallfacer-backward": plan.backward}
    flags["--wallfacer-head-groups"] = plan.head_groups
    if choice.q_kept:
        flags["--wallfacer-keep-gathered-q"] = True
    return flags


def save_flags(path: Path, choice: Choice, origin: str, others: dict[str, int]) -> None:
    """Write a choice as a preset that ``wallfacer run`` and ``extends:`` take.

    Args:
        path: of the YAML file.
        choice: whose flags.
        origin: the command that found it.
        others: more of Megatron's flags.
    """
    import yaml

    chosen = {"MODEL_ARGS": {**others, **flags_of(choice)}}
    path.write_text(f"# {origin}\n{yaml.safe_dump(chosen, sort_keys=False)}")


def _check_rest(model: Model, job: Job, spread: Spread, software: Software) -> None:
    """Check that a rank has memory for what is not attention's.

    Raises:
        OptionError: it has not.
    """
    from megatron_wallfacer.planning.attention_memory import AttentionMemory
    from megatron_wallfacer.planning.inventory import peak
    from megatron_wallfacer.planning.rank_memory import rank_buffers

    memory_gb = job.cluster.device.memory_gb
    moment, rest = peak(rank_buffers(model, job.shape.tokens, AttentionMemory(), spread, software))
    if rest >= memory_gb * 1e9:
        raise OptionError(
            "seq",
            job.shape.tokens * spread.cp,
            f"shorter, or on more ranks: without attention's buffers a rank needs {rest / 1e9:.0f} GB "
            f"of {memory_gb:g} ({moment})",
        )


def _row(model: Model, choice: Choice, spread: Spread, software: Software) -> Row:
    from megatron_wallfacer.planning.layer import step

    plan, bound = choice.plan, choice.bound
    common = {
        "name": choice.name or "",
        "grid": str(plan.grid),
        "placement": plan.grid.placement,
        "riders": (plan.forward, plan.backward),
        "q_kept": choice.q_kept,
        "bound_s": bound.seconds,
    }
    if not choice.can_be_played:
        nothing = dict.fromkeys(("seconds", "buffers_gb", "tokens_s", "mfu", "memory_gb"))
        return Row(**common, **nothing, reason=f"not played: too many ranks; bound by {bound.by}")
    whole = step(model, choice, choice.job.cluster, spread, software)
    return Row(
        **common,
        seconds=choice.played.seconds,
        buffers_gb=choice.buffer_bytes / 1e9,
        tokens_s=whole.tokens_s,
        mfu=whole.mfu,
        memory_gb=whole.memory_gb,
        reason=_reason(choice),
    )


def _reason(choice: Choice) -> str:
    """Bound by what, how far from that, and from compute."""
    played, bound = choice.played, choice.bound
    from_compute = f"{played.seconds / bound.kernel_s:.2f}x compute"
    if bound.by == "compute":
        return from_compute
    return f"{bound.by}, {played.seconds / bound.seconds:.2f}x; {from_compute}"


def _summary(found: Found, job: Job) -> str:
    from megatron_wallfacer.planning.search import TIE
    from megatron_wallfacer.schedule.bounds import backward_bound, forward_bound

    best = found.best[0]
    least = forward_bound(job.cp_size, job.shape.kappa) + backward_bound(job.cp_size, job.shape.kappa)
    ratio = f", {best.words / least:.2f}x the least for undivided heads" if least else ""
    large = f", {found.too_large} did not fit the memory" if found.too_large else ""
    return (
        f"{len(found.best)} of {found.legal} grids and placements played{large}; "
        f"the first moves the fewest words of those within {TIE - 1:.0%} of the fastest: "
        f"{best.words:.2f} to a rank in units of n*H{ratio}"
    )


def _groups(spread: Spread) -> str:
    return ", ".join(f"{name} {size}" for name, size in asdict(spread).items() if size > 1) or "one rank"


def _write(arguments: argparse.Namespace, best: Choice, rows: list[Row], corners: list[Row], spread: Spread) -> None:
    if arguments.save:
        parallel = {"--tensor-model-parallel-size": spread.tp, "--pipeline-model-parallel-size": spread.pp}
        asked = f"wallfacer plan --cluster {arguments.cluster} --model {arguments.model} --seq {arguments.seq}"
        save_flags(arguments.save, best, asked, parallel)
    if arguments.trace:
        from megatron_wallfacer.planning.trace import write_trace

        write_trace(best.spans(), arguments.trace)
    if arguments.plot:
        from megatron_wallfacer.cli.pictures.plans import draw_plans

        title = f"{arguments.model}, {arguments.seq} tokens on {arguments.cluster}, {spread.cp} context-parallel ranks"
        draw_plans(arguments.plot, [*rows, *corners], title)
