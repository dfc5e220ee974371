"""Where the processor time of a scheme goes: ``python -m benchmarks.processor CONFIG.yaml --schemes LABEL ...``.

One forward + backward on real kernels, each operation of the schedule on the thread that runs it; the rest of the
process is the threads of the transport. Seconds of all ranks together, over those of one call in one process.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.emulated import ONE_THREAD

#: What is told apart, in the order of the table.
PARTS = ("kernels", "merges and sums", "packing, unpacking", "waiting", "other", "transport")


class Account:
    """A kernel and an observer that note processor seconds of the thread that calls them."""

    def __init__(self, kernel: Any) -> None:
        self._kernel, self.name, self.capabilities = kernel, kernel.name, kernel.capabilities
        self.seconds: Counter[str] = Counter()

    def forward(self, *args: Any) -> Any:
        with self._on("kernels"):
            return self._kernel.forward(*args)

    def backward(self, *args: Any) -> Any:
        with self._on("kernels"):
            return self._kernel.backward(*args)

    @contextmanager
    def record(self, what: Any) -> Iterator[None]:
        """An observer of the engine's: an operation, or a move that is waited for; nothing is noted of a pass."""
        if type(what).__name__ == "Pass":
            yield
            return
        kind = {"Transfer": "waiting", "Attend": "merges and sums", "Accumulate": "merges and sums"}
        kernels = self.seconds["kernels"]
        with self._on(kind.get(type(what).__name__, "packing, unpacking")):
            yield
        if type(what).__name__ == "Attend":
            self.seconds["merges and sums"] -= self.seconds["kernels"] - kernels

    @contextmanager
    def _on(self, part: str) -> Iterator[None]:
        begin = time.thread_time()
        yield
        self.seconds[part] += time.thread_time() - begin


def accounted(state: Any, label: str) -> dict[str, float]:
    """A job of a rank: processor seconds of one forward + backward, by part."""
    contender, account = state.contenders[label], Account(state.kernel)
    # Whatever is done once only: connections, code that is compiled or loaded.
    contender.attend(*(x[:, :2] for x in state.inputs), state.kernel).backward(state.dout[:, :2])
    contender.observer = account.record
    process, thread = time.process_time(), time.thread_time()
    contender.attend(*state.inputs, account).backward(state.dout)
    of_thread = time.thread_time() - thread
    account.seconds["other"] = of_thread - sum(account.seconds.values())
    account.seconds["transport"] = time.process_time() - process - of_thread
    return dict(account.seconds)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0, or 2 for what cannot be done here."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.processor", description=__doc__)
    parser.add_argument("config", type=Path, help="a setting with real kernels, e.g. overhead-1x8.yaml")
    parser.add_argument("--schemes", nargs="+", required=True, metavar="LABEL", help="labels of ours")
    arguments = parser.parse_args(argv)
    os.environ.update(dict.fromkeys(ONE_THREAD, "1"))
    from megatron_wallfacer.errors import WallfacerError

    try:
        print(_run(arguments))
    except WallfacerError as error:
        print(f"benchmarks: error: {error}", file=sys.stderr)
        return 2
    return 0


def _run(arguments: argparse.Namespace) -> str:
    import torch

    from benchmarks import jobs
    from benchmarks.cluster.cluster import PREFIX, Cluster
    from benchmarks.cluster.ranks import Ranks
    from benchmarks.cluster.tools import require_namespaces
    from benchmarks.compute import alone
    from benchmarks.config import load_config
    from benchmarks.report import surroundings
    from benchmarks.schemes import contenders

    config = load_config(arguments.config)
    require_namespaces(f"{PREFIX}-{os.getpid()}-")
    chosen, about = contenders(config, arguments.schemes), surroundings(config)
    torch.set_num_threads(1)
    single = alone(config.compute, config.shape, config.topology.ranks).single_s
    assert single is not None, "the setting models its kernels"
    lines = [f"{about['machine']}; {about['versions']}", f"{config.shape}; one call: {single:.2f} s", ""]
    lines += [f"| scheme | {' | '.join(PARTS)} | all |", f"| --- |{' --- |' * (len(PARTS) + 1)}"]
    with (
        Cluster(config.topology) as cluster,
        Ranks(cluster.wiring, lambda rank: jobs.RankState(config, chosen, None), timeout_s=900.0) as ranks,
    ):
        for contender in chosen:
            ranks.run(jobs.prepare, contender.label)
            found = ranks.run(accounted, contender.label)
            shares = [sum(rank.get(part, 0.0) for rank in found) / single for part in PARTS]
            row = " | ".join(f"{share:.3f}" for share in (*shares, sum(shares)))
            lines.append(f"| {contender.label} | {row} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
