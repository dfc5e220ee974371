"""Compare schemes and peers on an emulated cluster: ``python -m benchmarks.emulated CONFIG.yaml``."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import NoReturn

#: One thread a rank, as under torchrun; before torch and its libraries read them.
ONE_THREAD = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0, 1 for a run that failed, 2 for what cannot be done here, 130 and 143 for an interruption."""
    arguments = _parser().parse_args(argv)
    os.environ.update(dict.fromkeys(ONE_THREAD, "1"))
    signal.signal(signal.SIGTERM, _stop)
    signal.signal(signal.SIGHUP, _stop)
    from benchmarks.cluster.ranks import RankFailed
    from megatron_wallfacer.errors import WallfacerError

    try:
        _run(arguments)
    except RankFailed as error:
        print(f"benchmarks: error: {error}", file=sys.stderr)
        return 1
    except WallfacerError as error:
        print(f"benchmarks: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("benchmarks: interrupted", file=sys.stderr)
        return 130
    return 0


def _run(arguments: argparse.Namespace) -> None:
    from benchmarks.cluster.cluster import PREFIX
    from benchmarks.cluster.tools import require_namespaces
    from benchmarks.config import load_config

    config = load_config(arguments.config)
    # Before the heavy imports: what cannot be done here is said at once.
    require_namespaces(f"{PREFIX}-{os.getpid()}-")
    from benchmarks.measure import Options, measure
    from benchmarks.report import surroundings, table, write
    from benchmarks.schemes import contenders

    chosen = contenders(config, arguments.schemes)
    if arguments.list:
        print("\n".join(contender.label for contender in chosen))
        return
    about = surroundings(config)  # now: the sources may be edited while it runs
    directory = arguments.out or Path("runs/benchmarks") / f"{config.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    timelines = directory.resolve() / "timelines" if arguments.timelines else None
    options = Options(arguments.repeats, None if arguments.allow_busy else arguments.idle_wait, timelines)
    measurement = measure(config, chosen, options, _say, lambda found: write(directory, config, about, found))
    print(f"{about['command']}\n{about['machine']}; {about['versions']}\n{config.topology}\n{config.shape}")
    print(f"{config.compute}; goodput {measurement.goodput}\n\n{table(measurement.results)}\n\nwritten to {directory}")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.emulated", description=__doc__)
    parser.add_argument("config", type=Path, help="a setting, e.g. benchmarks/configs/c-4x4.yaml")
    parser.add_argument("--schemes", nargs="+", metavar="LABEL", help="labels or patterns of labels (default: all)")
    parser.add_argument("--list", action="store_true", help="print the labels and stop")
    parser.add_argument("--repeats", type=int, default=7, help="samples of each scheme (default: 7)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where to write (default: a folder in runs/benchmarks)")
    parser.add_argument("--idle-wait", type=float, default=300, metavar="S", help="seconds to wait for an idle machine")
    parser.add_argument("--allow-busy", action="store_true", help="measure on a busy machine; samples are marked")
    parser.add_argument("--timelines", action="store_true", help="write Perfetto timelines of one more run of each")
    return parser


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    """Leave by an exception, so that everything is cleaned up on the way."""
    raise SystemExit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
