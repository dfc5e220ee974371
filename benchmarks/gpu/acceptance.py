"""Everything that one GPU can show, in ten minutes: run by ``scripts/gpu_acceptance.sh``.

Parts run in the order of their importance. Each has a time limit: its share of the time that is left. So the time that
one part does not need goes to the next ones. A part that fails or is killed costs the others nothing. After each
command ``OUT/results.md`` is a whole page again; logs are in ``OUT/logs`` and tables as CSV in ``OUT/<command>``.
"""

from __future__ import annotations

import argparse
import datetime
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu import processes
from benchmarks.gpu.parts import MACHINE, Command, Part, parts
from benchmarks.gpu.results import Outcome, Results

ROOT = Path(__file__).resolve().parents[2]
SECONDS, SMOKE_SECONDS = 600.0, 600.0
#: The shortest limit of a command: starting a process and its libraries takes long on a busy machine.
LEAST_S, SMOKE_LEAST_S = 25.0, 120.0
#: Part of a limit that is left out of a budget: starting, and ending in time.
START_S = 20.0


class Acceptance:
    """One run of the parts.

    Args:
        chosen: parts in order.
        out: folder of the results.
        seconds: time limit of the whole run.
        least_s: shortest limit of a command, as long as there is time.
        python: interpreter of the commands.
        title: heading of the page.
    """

    def __init__(
        self, chosen: Sequence[Part], out: Path, seconds: float, least_s: float, python: str, title: str
    ) -> None:
        self._out, self._least_s, self._python = out.resolve(), least_s, python
        self._deadline = time.monotonic() + seconds
        (self._out / "logs").mkdir(parents=True, exist_ok=True)
        self._results = Results(self._out / "results.md", title)
        for part in chosen:
            self._results.outcomes.append((part, [self._outcome(one) for one in part.commands]))

    def run(self) -> int:
        """Run every part.

        Returns:
            1 if a command failed, was killed or was not run, else 0.
        """
        machine = self._outcome(MACHINE)
        self._run(machine, 60.0)
        self._results.notes = [f"    {line}" for line in machine.log.read_text(errors="replace").splitlines()]
        self._results.write()
        waiting = [one for _, outcomes in self._results.outcomes for one in outcomes]
        while waiting:
            left = self._deadline - time.monotonic()
            one, share = waiting[0], sum(other.command.share for other in waiting)
            if left > 1.0:
                self._run(one, min(left, max(self._least_s, left * one.command.share / share)))
                print(f"{one.command.name}: {one.verdict}; {one.counts}", file=sys.stderr, flush=True)
            self._results.write()
            waiting.pop(0)
        print(self._results.page)
        return int(any(one.verdict != "ok" for _, outcomes in self._results.outcomes for one in outcomes))

    def _outcome(self, command: Command) -> Outcome:
        folder = self._out / command.name
        typed = shlex.join(["python", *self._words(command)])
        return Outcome(command, typed, folder, self._out / "logs" / f"{command.name}.log")

    def _words(self, command: Command) -> list[str]:
        """Arguments of the interpreter."""
        start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(command.ranks)]
        return [*(start if command.ranks > 1 else ()), "-m", command.module, *command.arguments]

    def _run(self, one: Outcome, limit_s: float) -> None:
        words, one.limit_s = self._words(one.command), limit_s
        # Tables of an earlier run in the same folder are not results of this one.
        shutil.rmtree(one.folder, ignore_errors=True)
        if one.command.takes_budget:
            words += ["--out", str(one.folder), "--budget", f"{max(limit_s / 2, limit_s - START_S):.0f}"]
        environment = {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])}
        begin = time.monotonic()
        variables = {"OMP_NUM_THREADS": "1", **environment, **one.command.variables}
        one.code = processes.run([self._python, *words], variables, one.log, limit_s)
        one.seconds = time.monotonic() - begin


def _card() -> str:
    """Name of the GPU as part of a file name; empty where PyTorch finds none. This process takes no memory of it."""
    asks = "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else '')"
    done = subprocess.run([sys.executable, "-c", asks], stdout=subprocess.PIPE, text=True, check=False)
    return done.stdout.strip().replace(" ", "-").lower()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the parts that are asked for; 1 if one of them is not as it must be, 2 without a GPU."""
    parser = argparse.ArgumentParser(prog="gpu_acceptance.sh", description=__doc__.partition("\n")[0])
    parser.add_argument("--smoke", action="store_true", help="on a CPU, small: that everything starts, no figures")
    parser.add_argument("--list", action="store_true", help="print the parts and stop")
    parser.add_argument("--only", action="append", metavar="PART", help="this part only; may be repeated")
    parser.add_argument("--seconds", type=float, help=f"time limit (default: {SECONDS:.0f}; smoke {SMOKE_SECONDS:.0f})")
    parser.add_argument("--out", type=Path, help="folder of the results (default: runs/gpu/<date>-<card>)")
    options = parser.parse_args(argv)
    chosen = parts(smoke=options.smoke)
    names = [part.name for part in chosen]
    if options.list:
        print("\n".join(f"{part.name:10} {part.title}" for part in chosen))
        return 0
    unknown = set(options.only or ()) - set(names)
    if unknown:
        parser.error(f"--only {min(unknown)}: must be one of {', '.join(names)}")
    card = "cpu" if options.smoke else _card()
    if not card:
        print("gpu_acceptance.sh: PyTorch finds no GPU here: --smoke runs anywhere", file=sys.stderr)
        return 2
    # A run that is ended from outside ends its commands, and leaves the page of those that have run.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    date = datetime.date.today().isoformat()
    out = options.out or ROOT / "runs" / "gpu" / f"{date}-{card}"
    title = f"{card}, {date}" + (" (smoke: the figures mean nothing)" if options.smoke else "")
    seconds = options.seconds or (SMOKE_SECONDS if options.smoke else SECONDS)
    least_s = SMOKE_LEAST_S if options.smoke else LEAST_S
    wanted = [part for part in chosen if options.only is None or part.name in options.only]
    return Acceptance(wanted, out, seconds, least_s, sys.executable, title).run()


if __name__ == "__main__":
    sys.exit(main())
