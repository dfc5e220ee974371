"""Time of the comparison of ranks at start: ``python -m benchmarks.agreement [--ranks 512]``.

Every rank is a thread with its own connection to one TCPStore, and has a record as large as that of Megatron's
arguments. The threads share one interpreter: ranks that are processes take less time.
"""

from __future__ import annotations

import argparse
import threading
import time
from collections.abc import Sequence
from datetime import timedelta

import torch.distributed as dist

from megatron_wallfacer.engine.agreement.compare import Record, Verdict, compare
from megatron_wallfacer.engine.agreement.exchange import Exchange

#: Arguments of Megatron 0.19.
ARGUMENTS = 806
TIMEOUT = timedelta(minutes=2)


def seconds_of(ranks: int, odd: int) -> tuple[float, Verdict]:
    """Return the time from the first record to the last verdict, and the verdict.

    Args:
        ranks: number of them.
        odd: ranks that have another value of one setting.
    """
    settings = {f"--argument-number-{number}": str(number) for number in range(ARGUMENTS)}
    usual, other = Record(settings).to_text(), Record(settings | {"--argument-number-7": "8"}).to_text()
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=TIMEOUT)
    clients = [dist.TCPStore("127.0.0.1", server.port, wait_for_workers=False, timeout=TIMEOUT) for _ in range(ranks)]
    verdicts: list[Verdict] = []

    def join(rank: int) -> None:
        exchange = Exchange(clients[rank], range(ranks), rank, TIMEOUT)
        verdicts.append(exchange.run(other if rank < odd else usual, Record.from_text, compare))

    threads = [threading.Thread(target=join, args=(rank,)) for rank in range(ranks)]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - started
    assert len(verdicts) == ranks
    assert len(set(verdicts)) == 1
    return seconds, verdicts[0]


def main(argv: Sequence[str] | None = None) -> None:
    """Print the time of ranks that agree and of ranks that do not."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.agreement", description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=512, help="number of ranks (default: 512)")
    ranks = parser.parse_args(argv).ranks
    for odd in (0, 1):
        seconds, verdict = seconds_of(ranks, odd)
        print(f"{ranks} ranks, {ARGUMENTS} arguments: {seconds:.2f} s; {'; '.join(verdict.errors) or 'all agree'}")


if __name__ == "__main__":
    main()
