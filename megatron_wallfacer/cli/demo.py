"""The demonstration: one small GPT, trained by Megatron twice, once split over P ranks and once not split at all."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_wallfacer.errors import OptionError, WallfacerError
from megatron_wallfacer.megatron.needed_arguments import GPU_VARIABLES
from megatron_wallfacer.megatron.version import megatron_version
from megatron_wallfacer.presets.shared_gpus import sharing_here
from megatron_wallfacer.schedule.plan import Plan
from megatron_wallfacer.schedule.schemes import make_plan
from megatron_wallfacer.shipped import SCRIPT
from megatron_wallfacer.training_runs.demo import complete, gpus_here, runs_of
from megatron_wallfacer.training_runs.failing_rank import failure_text
from megatron_wallfacer.training_runs.loss_comparison import EXACT, WHOLE, compare
from megatron_wallfacer.training_runs.training_log import Iteration, parse_iteration

if TYPE_CHECKING:
    from rich.console import Console

SEQUENCE = 1024
HEADS, KV_HEADS = 8, 4

#: What people train today, in small: GQA, RoPE, RMSNorm, SwiGLU.
MODEL = (
    "--num-layers 4 --hidden-size 128 --ffn-hidden-size 384 "
    f"--num-attention-heads {HEADS} --group-query-attention --num-query-groups {KV_HEADS} "
    "--position-embedding-type rope --normalization RMSNorm --swiglu --disable-bias-linear"
).split()

TRAINING = (
    f"--seq-length {SEQUENCE} --max-position-embeddings {SEQUENCE} --micro-batch-size 1 --global-batch-size 2 "
    "--lr 2e-3 --lr-decay-style constant --clip-grad 1.0 --weight-decay 0.1 --seed 1234 "
    "--attention-dropout 0 --hidden-dropout 0 --split 98,2,0 --eval-iters 0 --log-interval 1"
).split()


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add ``demo``."""
    parser = commands.add_parser("demo", help="train a small GPT with and without context parallelism, and compare")
    parser.add_argument("--directory", type=Path, default=Path("runs/demo"), help="where to leave data, logs, pictures")
    parser.add_argument("--cp-size", type=int, default=8, metavar="P", help="context-parallel ranks (default: 8)")
    # `auto` gathers all keys where ranks have as few tokens as here.
    parser.add_argument("--scheme", default="team-ring", help="as --wallfacer-scheme (default: team-ring)")
    parser.add_argument("--iterations", type=int, default=20, metavar="N", help="training iterations (default: 20)")
    parser.add_argument("--script", type=Path, help="Megatron script to run (default: this repository's own)")
    parser.add_argument("--json", action="store_true", help="print JSON at the end; the rest goes to stderr")
    parser.set_defaults(run=run_demo)


def run_demo(arguments: argparse.Namespace) -> int:
    """Train, compare; the exit code is 1 where the losses differ."""
    names = ("directory", "cp_size", "scheme", "iterations", "script", "json")
    return Demo(**{name: getattr(arguments, name) for name in names}).run()


@dataclass(frozen=True)
class Result:
    """What ``--json`` prints.

    Attributes:
        losses: of each iteration, by the run.
        differences: of the split run, relative to the first run, of each iteration.
        largest, allowed: of the differences.
        agree: the largest is allowed.
        pictures: where they lie.
    """

    losses: dict[str, list[float]]
    differences: list[float]
    largest: float
    allowed: float
    agree: bool
    pictures: list[str]


@dataclass(frozen=True)
class Demo:
    """What ``wallfacer demo`` was asked for."""

    directory: Path
    cp_size: int = 8
    scheme: str = "team-ring"
    iterations: int = 20
    script: Path | None = None
    json: bool = False

    def run(self) -> int:
        """Train twice, compare, draw.

        Returns:
            0 if every loss agrees to the tolerance, else 1.

        Raises:
            WallfacerError: a run failed, or the options do not fit.
        """
        from rich.console import Console

        # With --json, stdout is for whoever reads that.
        console = Console(stderr=self.json)
        script, plan = self._script(), self._plan()
        result = self._compare(plan, self._train(console, script, plan))
        _print_comparison(console, result)
        verdict = "[green]they agree[/]" if result.agree else "[red]they differ[/]"
        console.print(
            f"Largest relative difference of the loss {result.largest:.1e}, allowed {result.allowed:.0e}: {verdict}."
        )
        console.print(f"Pictures: {', '.join(result.pictures)}", soft_wrap=True)
        if self.json:
            print(json.dumps(asdict(result), indent=2))
        return 0 if result.agree else 1

    def _train(self, console: Console, script: Path, plan: Plan) -> dict[str, list[float]]:
        """Losses of each run, by its name."""
        self.directory.mkdir(parents=True, exist_ok=True)
        gpus = gpus_here()
        arguments = training_arguments(self.directory, self.iterations)
        runs = runs_of(self.cp_size, self.scheme, plan.scheme, gpus)

        def seen(iteration: Iteration) -> None:
            _print_iteration(console, iteration)

        losses = {}
        for number, run in enumerate(runs, 1):
            log = self.directory / run.log
            console.print(f"\n[bold]{number} of {len(runs)}[/] {run.title}; log: {log}", soft_wrap=True)
            words = complete([*arguments, *run.flags], gpus)
            losses[run.name] = [iteration.loss for iteration in train(script, run.ranks, words, log, seen)]
        return losses

    def _compare(self, plan: Plan, losses: dict[str, list[float]]) -> Result:
        """Draws, too."""
        from megatron_wallfacer.plots.grid import draw_grid
        from megatron_wallfacer.plots.loss import draw_losses

        split = list(losses)[-1]
        comparison = compare(losses.get(EXACT, losses[WHOLE]), losses[WHOLE], {split: losses[split]})
        pictures = self.directory / "loss.png", self.directory / "grid.png"
        title = "Byte-level GPT on Python's standard library"
        draw_losses(losses, pictures[0], title, tolerance=comparison.allowed)
        draw_grid(plan, pictures[1])
        largest, agree = comparison.largest(split), comparison.agrees(split)
        paths = [str(path) for path in pictures]
        return Result(losses, comparison.differences[split], largest, comparison.allowed, agree, paths)

    def _plan(self) -> Plan:
        try:
            for name in ("cp_size", "iterations"):
                if getattr(self, name) < 1:
                    raise OptionError(name, getattr(self, name), "a positive number")
            tokens = SEQUENCE // self.cp_size
            return make_plan(self.scheme, self.cp_size, q_heads=HEADS, kv_heads=KV_HEADS, tokens=tokens)
        except OptionError as error:
            raise WallfacerError(
                f"--{error.option.replace('_', '-')} {error.value}: must be {error.allowed}"
            ) from error

    def _script(self) -> Path:
        script = self.script or SCRIPT
        if not script.is_file():
            raise WallfacerError(
                f"{script} is not a file; give --script, the pretrain_gpt.py of a Megatron-LM checkout"
            )
        return script


def training_arguments(directory: Path, iterations: int) -> list[str]:
    """Megatron's for the demonstration's model; its data are put into the folder."""
    from megatron_wallfacer.megatron.corpus import build_corpus, tokenizer_arguments

    data = ["--data-path", str(build_corpus(directory / "corpus")), *tokenizer_arguments(megatron_version()[:2])]
    return [*MODEL, *TRAINING, *data, "--train-iters", str(iterations)]


def train(
    script: Path, ranks: int, arguments: Sequence[str], log: Path, seen: Callable[[Iteration], None]
) -> list[Iteration]:
    """Run a Megatron script under the plugin's launcher, on ranks of this machine.

    Args:
        script: Megatron script.
        ranks: processes to start.
        arguments: Megatron's and the plugin's.
        log: everything it prints goes there; what each rank prints also into a folder beside it, ``LOG-ranks``.
        seen: called with each iteration as it is reported.

    Raises:
        WallfacerError: it failed; with the last error lines of the rank that failed first.
    """
    folder = log.with_name(f"{log.name}-ranks")
    shutil.rmtree(folder, ignore_errors=True)
    sharing = sharing_here(ranks, arguments, os.environ)
    if sharing.line:
        print(f"wallfacer: {sharing.line}", file=sys.stderr, flush=True)
    # Not buffered, so that iterations are seen at once; --tee marks each line with its rank.
    launch = ["-u", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    launch += ["--tee", "3", "--log-dir", str(folder), "-m", "megatron_wallfacer"]
    command, iterations = [sys.executable, *launch, str(script), *arguments, *sharing.flags], []
    with log.open("w") as file:
        # A session of its own, so that an interrupt here ends every rank.
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
            # One thread a rank, also where torchrun leaves a lone rank all cores: threads that wait for each other
            # on a busy machine are ten times slower.
            env=os.environ | sharing.environment | {"OMP_NUM_THREADS": "1"} | GPU_VARIABLES,
        )
        try:
            assert process.stdout is not None
            for line in process.stdout:
                file.write(line)
                iteration = parse_iteration(line)
                if iteration is not None:
                    iterations.append(iteration)
                    seen(iteration)
            code = process.wait()
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
                process.wait()
    if code != 0 or not iterations:
        told = failure_text(log.read_text(errors="replace"))
        raise WallfacerError(f"training on {ranks} ranks ended with exit code {code}; see {log}: {told}")
    return iterations


def _print_iteration(console: Console, iteration: Iteration) -> None:
    console.print(f"  iteration {iteration.number:3}   loss {iteration.loss:.6f}", highlight=False)


def _print_comparison(console: Console, result: Result) -> None:
    from megatron_wallfacer.cli.table import new_table, print_table

    headings = ("iteration", *result.losses, "relative difference")
    table = new_table(console, *headings, title="\nloss, iteration by iteration", justify="right")
    for number, (*losses, difference) in enumerate(zip(*result.losses.values(), result.differences, strict=True), 1):
        table.add_row(str(number), *(f"{loss:.6f}" for loss in losses), f"{difference:.1e}")
    print_table(console, table)
