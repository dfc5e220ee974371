"""The demonstration: one small GPT, trained by Megatron twice, once split over P ranks and once not split at all."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

import megatron_wallfacer
from megatron_wallfacer.cli.pictures.grid import draw_grid
from megatron_wallfacer.cli.pictures.loss import TOLERANCE, differences, draw_losses
from megatron_wallfacer.cli.training_log import Iteration, parse_iteration
from megatron_wallfacer.errors import OptionError, WallfacerError
from megatron_wallfacer.megatron.corpus import build_corpus, tokenizer_arguments
from megatron_wallfacer.megatron.version import megatron_version
from megatron_wallfacer.schedule.plan import Plan
from megatron_wallfacer.schedule.schemes import make_plan

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


@dataclass(frozen=True)
class Demo:
    """What ``wallfacer demo`` was asked for."""

    directory: Path
    cp_size: int = 8
    scheme: str = "auto"
    iterations: int = 20
    script: Path | None = None

    def run(self) -> int:
        """Train twice, compare, draw.

        Returns:
            0 if every loss agrees to :data:`TOLERANCE`, else 1.

        Raises:
            WallfacerError: a run failed, or the options do not fit.
        """
        console = Console()
        script = self._script()
        plan = self._plan()
        self.directory.mkdir(parents=True, exist_ok=True)
        prefix = build_corpus(self.directory / "corpus")
        data = ["--data-path", str(prefix), *tokenizer_arguments(megatron_version()[:2])]
        arguments = [*MODEL, *TRAINING, *data, "--train-iters", str(self.iterations)]
        split = ["--wallfacer-cp-size", str(self.cp_size), "--wallfacer-scheme", self.scheme]

        console.print(f"\n[bold]1 of 2[/] Megatron as it is, 1 rank; log: {self.directory / 'cp1.log'}")
        whole = train(script, 1, arguments, self.directory / "cp1.log", lambda i: _print_iteration(console, i))
        console.print(
            f"\n[bold]2 of 2[/] {' '.join(split)}, {self.cp_size} ranks; log: {self.directory / 'wallfacer.log'}"
        )
        log = self.directory / "wallfacer.log"
        parted = train(script, self.cp_size, [*arguments, *split], log, lambda i: _print_iteration(console, i))

        losses = {
            "1 rank": [i.loss for i in whole],
            f"{self.cp_size} ranks, {plan.scheme}": [i.loss for i in parted],
        }
        apart = differences(*losses.values())
        console.print(_comparison(whole, parted, apart, self.cp_size))
        worst = max(apart)
        agree = worst <= TOLERANCE
        verdict = "[green]they agree[/]" if agree else "[red]they differ[/]"
        console.print(f"Largest relative difference of the loss {worst:.1e}, allowed {TOLERANCE:.0e}: {verdict}.")
        draw_losses(losses, self.directory / "loss.png", "Byte-level GPT on Python's standard library")
        draw_grid(plan, self.directory / "grid.png")
        console.print(f"Pictures: {self.directory / 'loss.png'}, {self.directory / 'grid.png'}")
        return 0 if agree else 1

    def _plan(self) -> Plan:
        try:
            return make_plan(self.scheme, self.cp_size, q_heads=HEADS, kv_heads=KV_HEADS)
        except OptionError as error:
            raise WallfacerError(
                f"--{error.option.replace('_', '-')} {error.value}: must be {error.allowed}"
            ) from error

    def _script(self) -> Path:
        script = self.script or Path(megatron_wallfacer.__file__).parents[1] / "scripts" / "pretrain_gpt.py"
        if not script.is_file():
            raise WallfacerError(
                f"{script} is not a file; give --script, the pretrain_gpt.py of a Megatron-LM checkout"
            )
        return script


def train(
    script: Path, ranks: int, arguments: Sequence[str], log: Path, seen: Callable[[Iteration], None]
) -> list[Iteration]:
    """Run a Megatron script under the plugin's launcher, on ranks of this machine.

    Args:
        script: Megatron script.
        ranks: processes to start.
        arguments: Megatron's and the plugin's.
        log: everything it prints goes there.
        seen: called with each iteration as it is reported.

    Raises:
        WallfacerError: it failed; with the last lines of the log.
    """
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m", "megatron_wallfacer"]
    command = [sys.executable, *launch, str(script), *arguments]
    iterations, last = [], deque[str](maxlen=15)
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
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        try:
            assert process.stdout is not None
            for line in process.stdout:
                file.write(line)
                last.append(line)
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
        raise WallfacerError(f"training on {ranks} ranks ended with exit code {code}; see {log}:\n{''.join(last)}")
    return iterations


def _print_iteration(console: Console, iteration: Iteration) -> None:
    console.print(f"  iteration {iteration.number:3}   loss {iteration.loss:.6f}", highlight=False)


def _comparison(whole: Sequence[Iteration], parted: Sequence[Iteration], apart: Sequence[float], cp_size: int) -> Table:
    table = Table(title="\nloss, iteration by iteration")
    for heading in ("iteration", "1 rank", f"{cp_size} ranks", "relative difference"):
        table.add_column(heading, justify="right")
    for a, b, difference in zip(whole, parted, apart, strict=True):
        table.add_row(str(a.number), f"{a.loss:.6f}", f"{b.loss:.6f}", f"{difference:.1e}")
    return table
