"""Host time of attention passes, on a CPU: ``python -m benchmarks.host``.

Attention, merges, sums and copies are empty functions, tensors are as small as they can be, and messages go through
torch's fake process group. What is left is Python, the dispatcher and autograd: the time in which a GPU gets no work.
Thread CPU time of one thread, in slices: one slice is ``x[a:b]`` of a tensor, timed between the passes.
"""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Iterator, Sequence

import torch

from benchmarks.gpu.tables import markdown
from benchmarks.host import beside
from benchmarks.host.passes import HEADS, PASSES, Row, measure
from megatron_wallfacer.errors import OptionError, WallfacerError

SCHEMES = ("team-ring", "ring", "wallfacer", "auto", "ulysses")
SIZES = (2, 4, 8, 64, 512)
#: Timed passes of all ranks' sizes together: a pass of many ranks takes long, and its median needs few rounds.
_ROUNDS, _FEWEST = 400, 10
HEADING = ("P", "scheme", "grid", "pass", "slices", "allowed", "attention calls", "other launches", "messages")


def rounds_of(cp_size: int) -> int:
    """Rounds that are timed: fewer for more ranks."""
    return max(_FEWEST, _ROUNDS // cp_size)


def rows(sizes: Sequence[int], schemes: Sequence[str]) -> Iterator[Row]:
    """Each scheme at each size; a size that a scheme does not support is left out, with a line on stderr."""
    for cp_size in sizes:
        for scheme in schemes:
            try:
                yield measure(cp_size, scheme, rounds_of(cp_size))
            except OptionError as error:
                print(f"P {cp_size}, {scheme}: left out: {error}", file=sys.stderr)


def lines(row: Row) -> list[tuple[str, ...]]:
    """Two lines of the table, forward and backward."""
    made = []
    for name, took, limit, counts in zip(PASSES, row.slices, row.allowed, row.counts, strict=True):
        numbers = (limit, counts.attention, counts.launches, counts.messages)
        made.append((str(row.cp_size), row.scheme, row.grid, name, *(f"{n:,.0f}" for n in (took, *numbers))))
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0; 1 with ``--check`` if a pass takes longer than allowed; 2 if a peer is not installed."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.host", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cp-size", type=int, nargs="+", help=f"ranks (default: {' '.join(map(str, SIZES))})")
    parser.add_argument("--schemes", nargs="+", choices=SCHEMES, default=SCHEMES)
    parser.add_argument("--peers", action="store_true", help="compare with ring-flash-attention and yunchang instead")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a pass takes longer than allowed")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    print(f"{_processor()}; Python {platform.python_version()}, torch {torch.__version__}; heads {HEADS[0]}/{HEADS[1]}")
    try:
        within = _peers(options.cp_size or beside.SIZES) if options.peers else _limits(options)
    except WallfacerError as error:
        print(f"benchmarks: error: {error}", file=sys.stderr)
        return 2
    return int(options.check and not within)


def _limits(options: argparse.Namespace) -> bool:
    found = list(rows(options.cp_size or SIZES, options.schemes))
    print(markdown(HEADING, [line for row in found for line in lines(row)]))
    return all(row.within() for row in found)


def _peers(sizes: Sequence[int]) -> bool:
    beside.load_peers()
    measured = {ranks: beside.beside(ranks, rounds_of(ranks)) for ranks in sizes}
    names = {**{name: name for name in beside.PEERS}, **{name: f"our {name}" for name in beside.PEER_OF}}
    body = [
        (str(ranks), *(" / ".join(f"{one:,.0f}" for one in times[name]) for name in names))
        for ranks, times in measured.items()
    ]
    print(markdown(("P", *names.values()), body))
    print(f"\n{' / '.join(PASSES)} of the last rank, in slices")
    return all(beside.not_slower(times) for times in measured.values())


def _processor() -> str:
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        names = {line.partition(":")[2].strip() for line in file if line.startswith("model name")}
    return ", ".join(sorted(names)) or platform.machine()


if __name__ == "__main__":
    sys.exit(main())
