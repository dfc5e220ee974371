"""Implement ``wallfacer demo``: train a small GPT on one rank and with context parallelism, and compare the losses."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_wallfacer.errors import OptionError, WallfacerError
from megatron_wallfacer.schedule.schemes import make_plan
from megatron_wallfacer.shipped import SCRIPT

if TYPE_CHECKING:
    from rich.console import Console

    from megatron_wallfacer.schedule.plan import Plan
    from megatron_wallfacer.training_runs.demo import DemoResult


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add the command ``demo``."""
    parser = commands.add_parser("demo", help="train a small GPT with and without context parallelism, and compare")
    parser.add_argument(
        "--directory", type=Path, default=Path("runs/demo"), help="folder for data, logs, plots (default: runs/demo)"
    )
    parser.add_argument("--cp-size", type=int, default=8, metavar="P", help="context-parallel ranks (default: 8)")
    # The model has so few tokens per rank that `auto` would choose a scheme that gathers all keys.
    parser.add_argument("--scheme", default="team-ring", help="value of --wallfacer-scheme (default: team-ring)")
    parser.add_argument("--iterations", type=int, default=20, metavar="N", help="training iterations (default: 20)")
    parser.add_argument("--script", type=Path, default=SCRIPT, help="Megatron script (default: the plugin's own)")
    parser.add_argument("--json", action="store_true", help="print JSON at the end, and everything else on stderr")
    parser.set_defaults(run=run_demo)


def run_demo(arguments: argparse.Namespace) -> int:
    """Train, compare the losses and draw plots. Return 0 if all losses agree within the tolerance, else 1."""
    from rich.console import Console

    console = Console(stderr=arguments.json)
    if not arguments.script.is_file():
        raise WallfacerError(
            f"--script {arguments.script}: must be a file, such as pretrain_gpt.py of a Megatron-LM checkout"
        )
    plan = _plan(arguments)
    result = compare_losses(plan, _train(arguments, console, plan.scheme), arguments.directory)
    _print_losses(console, result)
    verdict = "[green]they agree[/]" if result.agree else "[red]they differ[/]"
    console.print(
        f"Largest relative difference of the loss {result.largest:.1e}, allowed {result.allowed:.0e}: {verdict}."
    )
    console.print(f"Plots: {', '.join(result.pictures)}", soft_wrap=True)
    if arguments.json:
        print(json.dumps(asdict(result), indent=2))
    return 0 if result.agree else 1


def _plan(arguments: argparse.Namespace) -> Plan:
    from megatron_wallfacer.training_runs.demo import HEADS, KV_HEADS, SEQUENCE

    cp_size = arguments.cp_size
    try:
        for name in ("cp_size", "iterations"):
            if getattr(arguments, name) < 1:
                raise OptionError(name, getattr(arguments, name), "a positive number")
        return make_plan(arguments.scheme, cp_size, q_heads=HEADS, kv_heads=KV_HEADS, tokens=SEQUENCE // cp_size)
    except OptionError as error:
        flag = f"--{error.option.replace('_', '-')}"
        raise WallfacerError(f"{flag} {error.value}: must be {error.allowed}") from error


def _train(arguments: argparse.Namespace, console: Console, scheme: str) -> dict[str, list[float]]:
    """Return the losses of each run by the name of the run."""
    from megatron_wallfacer.training_runs.demo import complete_arguments, count_gpus, demo_runs, training_arguments
    from megatron_wallfacer.training_runs.local_run import train
    from megatron_wallfacer.training_runs.training_log import Iteration

    def print_iteration(iteration: Iteration) -> None:
        console.print(f"  iteration {iteration.number:3}   loss {iteration.loss:.6f}", highlight=False)

    directory: Path = arguments.directory
    directory.mkdir(parents=True, exist_ok=True)
    gpus, common = count_gpus(), training_arguments(directory, arguments.iterations)
    runs = demo_runs(arguments.cp_size, arguments.scheme, scheme, gpus)
    losses = {}
    for number, run in enumerate(runs, 1):
        log = directory / run.log
        console.print(f"\n[bold]{number} of {len(runs)}[/] {run.title}; log: {log}", soft_wrap=True)
        argv = complete_arguments([*common, *run.flags], gpus)
        iterations = train(arguments.script, run.ranks, argv, log, print_iteration)
        losses[run.name] = [iteration.loss for iteration in iterations]
    return losses


def compare_losses(plan: Plan, losses: dict[str, list[float]], directory: Path) -> DemoResult:
    """Compare the last run with the first run, and draw the losses and the grid into a folder.

    ``losses`` has the losses of each run, by iteration. The context-parallel run is the last.
    """
    from megatron_wallfacer.plots.grid import draw_grid
    from megatron_wallfacer.plots.loss import draw_losses
    from megatron_wallfacer.training_runs.demo import DemoResult
    from megatron_wallfacer.training_runs.loss_comparison import EXACT, WHOLE, compare

    last = list(losses)[-1]
    comparison = compare(losses.get(EXACT, losses[WHOLE]), losses[WHOLE], {last: losses[last]})
    files = directory / "loss.png", directory / "grid.png"
    title = "Byte-level GPT on Python's standard library"
    draw_losses(losses, files[0], title, tolerance=comparison.allowed)
    draw_grid(plan, files[1])
    largest, agree = comparison.largest(last), comparison.agrees(last)
    return DemoResult(
        losses, comparison.differences[last], largest, comparison.allowed, agree, [str(file) for file in files]
    )


def _print_losses(console: Console, result: DemoResult) -> None:
    from megatron_wallfacer.cli.table import new_table, print_table

    headings = ("iteration", *result.losses, "relative difference")
    table = new_table(console, *(f">{heading}" for heading in headings))
    table.title = "\nloss by iteration"
    for number, (*losses, difference) in enumerate(zip(*result.losses.values(), result.differences, strict=True), 1):
        table.add_row(str(number), *(f"{loss:.6f}" for loss in losses), f"{difference:.1e}")
    print_table(console, table)
