"""Predicts what was measured on an emulated cluster: ``python -m benchmarks.predict RUN ...``.

RUN is a folder that ``python -m benchmarks.emulated`` wrote. Each of our schemes in it is simulated
(:mod:`megatron_wallfacer.planning.simulator`) on a model of that cluster. Its numbers are of three kinds: those of the
setting (links, rate of the modelled kernel); goodput, which the run has tried with one message; and what its ranks cost
the machine's processors, from its microbenchmarks (:mod:`benchmarks.calibrate`). None comes from a scheme.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import mean, median
from typing import Any

from benchmarks.calibrate import Processors
from benchmarks.config import Config, parse_config
from benchmarks.schemes import plan_table
from megatron_wallfacer.errors import OptionError, WallfacerError
from megatron_wallfacer.planning.choice import AttentionJob, Choice
from megatron_wallfacer.planning.cluster import Cluster, Device, HostProcessors, LinkSpeed, MessageCost
from megatron_wallfacer.planning.search import preferred
from megatron_wallfacer.schedule.schemes import make_plan

#: Plays of each scheme: it is left to chance who waits for a processor.
_DRAWS = 5


@dataclass(frozen=True)
class Prediction:
    """One scheme, measured and predicted.

    Attributes:
        scheme: name of the scheme.
        measured_s: measured seconds of forward and backward.
        predicted_s: simulated seconds of forward and backward.
        volume: elements received per rank, in units of one Q shard.
    """

    scheme: str
    measured_s: float
    predicted_s: float
    volume: float

    @property
    def error(self) -> float:
        """Relative, signed."""
        return self.predicted_s / self.measured_s - 1


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 if every run is predicted as well as is claimed, 1 if not, 2 for what cannot be read."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.predict", description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folders of python -m benchmarks.emulated")
    parser.add_argument(
        "--calibrated-by", type=Path, metavar="RUN", help="whose microbenchmarks to take (default: each run's own)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all of it there, too")
    arguments = parser.parse_args(argv)
    try:
        return _run(arguments)
    except (WallfacerError, OSError, KeyError) as error:
        print(f"benchmarks: error: {error}", file=sys.stderr)
        return 2


def _run(arguments: argparse.Namespace) -> int:
    found, good = {}, True
    for run in arguments.runs:
        predictions = predict(run, arguments.calibrated_by)
        found[run.name] = [asdict(one) | {"error": one.error} for one in predictions]
        print(f"\n{run.name}\n{as_table(predictions)}\n{summary(predictions)}")
        good = good and holds(predictions)
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0 if good else 1


def predict(run: Path, calibrated_by: Path | None = None, draws: int = _DRAWS) -> list[Prediction]:
    """Return measured and predicted times for our schemes of a run, fastest measured first.

    Raises:
        KeyError, OSError: the folder is not one of ``benchmarks.emulated``.
    """
    about = json.loads((run / "run.json").read_text())
    setting = dict(about["setting"])
    name = setting.pop("name")
    config = parse_config(setting, name)
    cluster = cluster_of(config, about["goodput_mbit"], processors_of(calibrated_by or run))
    table = plan_table(config.topology.ranks, config.topology.ranks_per_node) | dict(config.schemes)
    rows = [row for row in csv.DictReader((run / "summary.csv").open()) if not row["problem"]]
    predictions = [
        Prediction(row["scheme"], float(row["median_s"]), *simulate(config, cluster, table[row["scheme"]], draws))
        for row in rows
        if row["scheme"] in table
    ]
    return sorted(predictions, key=lambda one: one.measured_s)


def processors_of(run: Path) -> Processors:
    """What a run's microbenchmarks found.

    Raises:
        OptionError: it ended before them.
    """
    found = json.loads((run / "run.json").read_text()).get("processors", {})
    if missing := [one.name for one in fields(Processors) if one.name not in found]:
        raise OptionError(
            "--calibrated-by",
            "unset",
            f"a whole run on that machine: {run} has no {', '.join(missing)}",
        )
    messages = tuple(MessageCost(**one) for one in found["messages"])
    return Processors(**{one.name: found[one.name] for one in fields(Processors)} | {"messages": messages})


def cluster_of(config: Config, goodput: dict[str, float], processors: Processors) -> Cluster:
    """Return the model of the emulated cluster.

    Args:
        config: the setting.
        goodput: Mbit/s that a message reached, ``inter`` and ``intra``.
        processors: of the machine that ran it.
    """
    topology = config.topology

    def link(name: str, mbit: float | None) -> LinkSpeed:
        reached = goodput.get(name, mbit)
        return LinkSpeed(None if reached is None else reached / 8e3, processors.latency_us)

    return Cluster(
        name=config.name,
        nodes=topology.nodes,
        gpus_per_node=topology.ranks_per_node,
        intra=link("intra", topology.intra_mbit),
        inter=link("inter", topology.inter_mbit),
        device=Device(config.compute.gflops_per_rank / 1e3, call_us=processors.idle_late_us),
        nics=topology.ranks_per_node if topology.nic == "rank" else 1,
        transport="gloo",
        host=host_of(processors),
    )


def host_of(processors: Processors) -> HostProcessors:
    """Return the shared processors of the modelled cluster, from those of a run's microbenchmarks."""
    costs = {one.name: getattr(processors, one.name) for one in fields(HostProcessors) if one.name != "wake_up_us"}
    return HostProcessors(**costs, wake_up_us=processors.late_us)


def simulate(config: Config, cluster: Cluster, arguments: dict[str, Any], draws: int = _DRAWS) -> tuple[float, float]:
    """Return the mean seconds of some simulated runs, forward and backward, and the communication volume.

    Args:
        config: the setting.
        cluster: its cluster, see :func:`cluster_of`.
        arguments: of ``make_plan``, and ``keep_gathered_q``.
        draws: simulated runs.
    """
    options, shape = dict(arguments), config.shard
    keep_gathered_q = bool(options.pop("keep_gathered_q", False))
    ranks = config.topology.ranks
    plan = make_plan(cp_size=ranks, q_heads=shape.q_heads, kv_heads=shape.kv_heads, **options)
    # Ranks share the processors, and so do not stay in step as those of a class would.
    choice = Choice(AttentionJob(cluster, shape, ranks), plan, keep_gathered_q)
    return mean(
        choice.simulate(choice.schedules, every_rank=True, seed=draw).seconds for draw in range(draws)
    ), choice.volume


def as_table(predictions: Sequence[Prediction]) -> str:
    """Markdown."""
    lines = ["| scheme | measured s | predicted s | error |", "| --- | --- | --- | --- |"]
    lines += [
        f"| {p.scheme} | {p.measured_s:.3f} | {p.predicted_s:.3f} | {100 * p.error:+.1f} % |" for p in predictions
    ]
    return "\n".join(lines)


def summary(predictions: Sequence[Prediction]) -> str:
    """One line."""
    return (
        f"{len(predictions)} schemes: rank correlation {rank_correlation(predictions):.3f}, "
        f"median error {100 * _median_error(predictions):.1f} %, "
        f"what is chosen takes {chosen_over_best(predictions):.3f} of the fastest measured"
    )


def holds(predictions: Sequence[Prediction]) -> bool:
    """Rank correlation at least 0.9, median error at most 15 %, the choice within 5 % of the best."""
    return (
        rank_correlation(predictions) >= 0.9
        and _median_error(predictions) <= 0.15
        and chosen_over_best(predictions) <= 1.05
    )


def rank_correlation(predictions: Sequence[Prediction]) -> float:
    """Spearman's, without ties.

    Raises:
        OptionError: fewer than two.
    """
    count = len(predictions)
    if count < 2:
        raise OptionError("schemes", count, "two of ours or more")
    measured = _places([one.measured_s for one in predictions])
    predicted = _places([one.predicted_s for one in predictions])
    apart = sum((a - b) ** 2 for a, b in zip(measured, predicted, strict=True))
    return 1 - 6 * apart / (count * (count * count - 1))


def chosen_over_best(predictions: Sequence[Prediction]) -> float:
    """Measured time of what a plan would take of these, over the least measured time."""
    chosen = predictions[preferred([(one.predicted_s, one.volume) for one in predictions])]
    return chosen.measured_s / min(one.measured_s for one in predictions)


def _median_error(predictions: Sequence[Prediction]) -> float:
    return median(abs(one.error) for one in predictions)


def _places(values: Sequence[float]) -> list[int]:
    order = sorted(range(len(values)), key=values.__getitem__)
    places = [0] * len(values)
    for place, index in enumerate(order):
        places[index] = place
    return places


if __name__ == "__main__":
    sys.exit(main())
