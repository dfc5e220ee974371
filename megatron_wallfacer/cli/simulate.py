"""``wallfacer simulate``: a training step on a cluster on paper."""

from __future__ import annotations

import argparse
import json
import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from megatron_wallfacer.cli.outputs import check_output
from megatron_wallfacer.errors import OptionError

_UNITS = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30}


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add ``simulate``."""
    parser = commands.add_parser("simulate", help="play a training step on a cluster")
    add_job_arguments(parser)
    parser.add_argument("--microbatches", type=int, default=1, metavar="N", help="sequences of a replica (default: 1)")
    parser.add_argument("--recompute", default="keep-attention", help="none, keep-attention (default) or full")
    parser.add_argument("--scheme", default="auto", help="as --wallfacer-scheme (default: auto)")
    for axis in ("head", "team", "kv-team"):
        parser.add_argument(f"--{axis}-size", type=int, metavar="N", help=f"ranks of the {axis} axis")
    parser.add_argument("--ring-window", type=int, metavar="N", help="ranks of the inner ring")
    parser.add_argument("--placement", help="teams-adjacent, rings-adjacent, head-first, ring-first or an axis order")
    parser.add_argument("--head-groups", type=int, metavar="N", help="groups of heads that are pipelined")
    parser.add_argument("--keep-q", action="store_true", help="keep the gathered queries from forward to backward")
    parser.add_argument("--trace", type=Path, metavar="FILE", help="write a layer as a Chrome or Perfetto trace")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run_simulate)


def add_job_arguments(parser: argparse.ArgumentParser, *, tp: int | None = 1) -> None:
    """Add what every command on a model and a cluster on paper takes.

    Args:
        parser: of the command.
        tp: default of ``--tp``; None is searched.
    """
    parser.add_argument("--cluster", default="h100-8x8", help="a preset or a YAML file (default: h100-8x8)")
    parser.add_argument("--nodes", type=int, metavar="N", help="in place of those of the cluster")
    parser.add_argument("--model", default="llama3-8b", help="a transformer by name (default: llama3-8b)")
    parser.add_argument("--seq", default="1M", metavar="TOKENS", help="length, such as 128K or 1M (default: 1M)")
    parser.add_argument("--full-mask", action="store_true", help="all pairs are live, instead of a causal half")
    default = "searched" if tp is None else tp
    parser.add_argument("--tp", type=int, default=tp, metavar="N", help=f"tensor-parallel ranks (default: {default})")
    parser.add_argument("--pp", type=int, default=1, metavar="N", help="pipeline stages (default: 1)")
    parser.add_argument("--cp", type=int, metavar="N", help="context-parallel ranks (default: all that are left)")


def run_simulate(arguments: argparse.Namespace) -> int:
    """Print what was asked for.

    Raises:
        WallfacerError: the trace cannot be written.
    """
    check_output("--trace", arguments.trace)
    _one(arguments)
    return 0


def token_count(text: str) -> int:
    """A length as people write it: ``65536``, ``128K``, ``1M``, ``1G``; K is 1024.

    Raises:
        OptionError: it is not written so.
    """
    match = re.fullmatch(r"([1-9][0-9]*)([kmg]?)", text.strip().lower())
    if not match:
        raise OptionError("seq", text, "a number of tokens such as 65536, 128K or 1M")
    return int(match[1]) * _UNITS[match[2]]


@dataclass(frozen=True)
class Line:
    """What a configuration takes, for JSON and the table.

    Attributes:
        cluster, model, tokens, ranks, spread, grid, placement, riders: what was played.
        bound_by: what limits attention, and ``of_bound`` how much longer than that it takes.
        step: times in seconds, memory in 1e9 bytes.
    """

    cluster: str
    model: str
    tokens: int
    ranks: int
    spread: dict[str, int]
    grid: str
    placement: tuple[str, ...]
    riders: tuple[str, str]
    bound_by: str
    of_bound: float
    step: dict[str, Any]


def _one(arguments: argparse.Namespace) -> None:
    from megatron_wallfacer.cli.memory_table import show_memory
    from megatron_wallfacer.planning.configuration import Configuration, Request
    from megatron_wallfacer.planning.layer import attention_job, step
    from megatron_wallfacer.planning.load import load_cluster
    from megatron_wallfacer.planning.model import RECOMPUTE, model_named
    from megatron_wallfacer.planning.parallel import Software, spread_over
    from megatron_wallfacer.planning.search import Choice
    from megatron_wallfacer.planning.trace import write_trace

    if arguments.recompute not in RECOMPUTE:
        raise OptionError("recompute", arguments.recompute, f"one of {', '.join(RECOMPUTE)}")
    cluster, model = load_cluster(arguments.cluster, arguments.nodes), model_named(arguments.model)
    software = replace(Software(), recompute=arguments.recompute)
    sizes = {"tp": arguments.tp, "pp": arguments.pp, "cp": arguments.cp, "microbatches": arguments.microbatches}
    spread = spread_over(cluster, **sizes)
    tokens = token_count(arguments.seq)
    job = attention_job(model, cluster, tokens, spread, causal=not arguments.full_mask, software=software)
    choice = Choice(job, _plan(arguments, job), q_kept=arguments.keep_q)
    _check_playable(arguments.scheme, choice)
    found = step(model, choice, cluster, spread, software)
    plan = choice.plan
    line = Line(
        cluster=str(cluster),
        model=model.name,
        tokens=tokens,
        ranks=cluster.ranks,
        spread=asdict(spread),
        grid=str(plan.grid),
        placement=plan.grid.placement,
        riders=(plan.forward, plan.backward),
        bound_by=choice.bound.by,
        of_bound=choice.played.seconds / choice.bound.seconds,
        step=asdict(found) | {"layer_s": found.layer_s, "exposed_s": found.exposed_s},
    )
    if arguments.trace:
        write_trace(choice.spans(), arguments.trace)
    if arguments.json:
        print(json.dumps(asdict(line), indent=2))
        return
    print(_text(line, cluster.device.memory_gb))
    if not found.fits:
        request = Request(model, cluster, tokens, tp=spread.tp, pp=spread.pp, cp=spread.cp)
        print()
        show_memory(Configuration(request, spread, software, choice))


def _check_playable(scheme: str, choice: Any) -> None:
    from megatron_wallfacer.planning.search import LONGEST_AXIS, MOST_RANKS_UNFOLDED

    if choice.can_be_played:
        return
    size = choice.job.cp_size
    if choice.plan.kv_order != "native":
        raise OptionError("cp", size, f"at most {MOST_RANKS_UNFOLDED} with scheme {scheme}, whose ranks are not alike")
    raise OptionError("scheme", scheme, f"a grid with no axis above {LONGEST_AXIS}, unlike {choice.plan.grid}")


def _plan(arguments: argparse.Namespace, job: Any) -> Any:
    from megatron_wallfacer.schedule.schemes import make_plan

    return make_plan(
        arguments.scheme,
        job.cp_size,
        head_size=arguments.head_size,
        team_size=arguments.team_size,
        kv_team_size=arguments.kv_team_size,
        ring_window=arguments.ring_window,
        placement=arguments.placement,
        head_groups=arguments.head_groups,
        q_heads=job.shape.q_heads,
        kv_heads=job.shape.kv_heads,
        tokens=job.shape.tokens,
    )


def _text(line: Line, memory_gb: float) -> str:
    step = line.step
    groups = ", ".join(f"{name} {size}" for name, size in line.spread.items() if size > 1) or "one rank"
    rows = [
        ("cluster", line.cluster),
        ("job", f"{line.model}, {line.tokens} tokens a sequence; {groups}"),
        ("attention", _attention(line)),
        ("bound by", f"{line.bound_by}; attention takes {line.of_bound:.2f} of that bound"),
        ("layer", f"{_ms(step['layer_s'])}: attention {_ms(step['attention_s'])}, of which {_ms(step['exposed_s'])} "
                  f"is not kernels; the rest {_ms(step['matmul_s'] + step['tensor_s'])}"),
        ("step", f"{step['seconds']:.2f} s, {step['tokens_s']:,.0f} tokens/s, MFU {100 * step['mfu']:.1f} %"),
        ("memory", f"{step['memory_gb']:.1f}{_of(memory_gb)} GB" + ("" if step["fits"] else ": does not fit")),
    ]  # fmt: skip
    return "\n".join(f"{name:<10} {text}" for name, text in rows)


def _attention(line: Line) -> str:
    if not line.placement:
        return line.grid
    riders = " and ".join(line.riders)
    return f"{line.grid}; nearest first: {', '.join(line.placement)}; rides forward and backward: {riders}"


def _of(memory_gb: float) -> str:
    """An emulated device has no memory of its own."""
    return "" if memory_gb == float("inf") else f" of {memory_gb:g}"


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.1f} ms"
