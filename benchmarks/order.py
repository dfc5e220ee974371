"""Compare the order of simulated with measured schemes: ``python -m benchmarks.order``.

Reads the committed results of every setting (docs/data), and simulates each of this project's schemes in them. Links
have the goodput of those runs. Processor costs are those of ``configs/cluster/emulated-b-4x4.yaml`` (settings b) and
``emulated-c-4x4.yaml`` (all others), measured on another day. With ``--runs``, measured times, goodput and processor
costs come from folders of ``benchmarks.emulated``. No number comes from a scheme.

Two claims for each setting: the measured time of the planner's choice is within 3 % of the fastest, and every pair of
schemes whose measured times differ by more than 5 % is simulated in the same order.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import combinations
from pathlib import Path

from benchmarks.calibrate import Processors
from benchmarks.config import load_config
from benchmarks.predict import Prediction, chosen_over_best, cluster_of, predict, simulate
from benchmarks.schemes import plan_table
from megatron_wallfacer.planning.cluster import HostProcessors
from megatron_wallfacer.planning.cluster_file import load_cluster

ROOT = Path(__file__).parents[1]
RESULTS, CONFIGS = ROOT / "docs/data/emulated-2026-11-20.csv", ROOT / "benchmarks/configs"
#: Parts of the rates between and within nodes that one message reached in the committed runs.
GOODPUT = {"inter": 0.973, "intra": 0.95}
#: Ratio of measured times above which two schemes differ; ratio of the choice to the fastest that a claim allows.
APART, NEAR = 1.05, 1.03


@dataclass(frozen=True)
class SettingResult:
    """Committed results of one setting, simulated.

    Attributes:
        name: name of the setting's configuration.
        predictions: measured and predicted times of this project's schemes.
    """

    name: str
    predictions: Sequence[Prediction]

    @property
    def pairs(self) -> list[tuple[Prediction, Prediction]]:
        """Pairs (faster, slower) with measured times more than 5 % apart."""
        ordered = sorted(self.predictions, key=lambda prediction: prediction.measured_s)
        return [(a, b) for a, b in combinations(ordered, 2) if b.measured_s > APART * a.measured_s]

    @property
    def wrong(self) -> list[tuple[Prediction, Prediction]]:
        """Pairs that are simulated in the opposite order."""
        return [(a, b) for a, b in self.pairs if a.predicted_s >= b.predicted_s]

    @property
    def choice(self) -> float:
        """Measured time of the planner's choice over the least measured time."""
        return chosen_over_best(self.predictions)

    @property
    def holds(self) -> bool:
        """Whether both claims hold."""
        return self.choice <= NEAR and not self.wrong


def measured(results: Path = RESULTS) -> dict[str, dict[str, float]]:
    """Return the measured medians in seconds, by setting and scheme.

    Args:
        results: CSV with a row for each setting and scheme.
    """
    medians: dict[str, dict[str, float]] = {}
    with results.open(newline="") as file:
        for row in csv.DictReader(file):
            medians.setdefault(row["setting"], {})[row["scheme"]] = float(row["median_s"])
    return medians


def simulated(name: str, seconds: dict[str, float], draws: int) -> SettingResult:
    """Simulate this project's schemes of one setting."""
    config = load_config(CONFIGS / f"{name}.yaml")
    topology = config.topology
    rates = {"inter": topology.inter_mbit, "intra": topology.intra_mbit}
    goodput = {link: GOODPUT[link] * rate for link, rate in rates.items() if rate is not None}
    cluster = cluster_of(config, goodput, processors(name))
    table = plan_table(topology.ranks, topology.ranks_per_node) | dict(config.schemes)
    return SettingResult(
        name,
        [
            Prediction(scheme, took, *simulate(config, cluster, table[scheme], draws))
            for scheme, took in seconds.items()
            if scheme in table
        ],
    )


def processors(name: str) -> Processors:
    """Return the processor costs of the shipped emulated cluster."""
    cluster = load_cluster(f"emulated-{'b' if name.startswith('b-') else 'c'}-4x4")
    assert cluster.host is not None
    costs = {one.name: getattr(cluster.host, one.name) for one in fields(HostProcessors) if one.name != "wake_up_us"}
    late = {"late_us": cluster.host.wake_up_us, "idle_late_us": cluster.device.call_us}
    return Processors(**costs, **late, latency_us=cluster.intra.latency_us)


def lines(settings: Sequence[SettingResult]) -> Iterator[str]:
    """Yield the table, the wrong pairs and the sums."""
    yield "| setting | schemes | the choice over the fastest measured | pairs > 5 % apart | in order |"
    yield "| --- | --- | --- | --- | --- |"
    for setting in settings:
        pairs, right = len(setting.pairs), len(setting.pairs) - len(setting.wrong)
        yield f"| `{setting.name}` | {len(setting.predictions)} | {setting.choice:.3f} | {pairs} | {right} |"
    yield ""
    for setting in settings:
        for fast, slow in setting.wrong:
            took = f"measured {fast.measured_s:.3f} and {slow.measured_s:.3f} s"
            simulated_as = f"simulated {fast.predicted_s:.3f} and {slow.predicted_s:.3f} s"
            yield f"{setting.name}: {fast.scheme} before {slow.scheme}: {took}, {simulated_as}"
    pairs, wrong = (sum(len(getattr(setting, kind)) for setting in settings) for kind in ("pairs", "wrong"))
    near = sum(setting.choice <= NEAR for setting in settings)
    yield f"{pairs - wrong} of {pairs} pairs are in order."
    yield f"The choice is within 3 % of the fastest in {near} of {len(settings)} settings."


def main(argv: Sequence[str] | None = None) -> int:
    """Print the comparison.

    Returns:
        0 if both claims hold in every setting, else 1.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.order", description=__doc__.partition("\n")[0])
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--settings", nargs="+", metavar="NAME", help="(default: all that are committed)")
    source.add_argument("--runs", nargs="+", type=Path, metavar="RUN", help="folders of python -m benchmarks.emulated")
    parser.add_argument("--draws", type=int, default=5, help="simulated runs of each scheme (default: 5)")
    options = parser.parse_args(argv)
    if options.runs:
        settings = [SettingResult(run.resolve().name, predict(run, draws=options.draws)) for run in options.runs]
    else:
        results = measured()
        settings = [simulated(name, results[name], options.draws) for name in options.settings or results]
    print("\n".join(lines(settings)))
    return 0 if all(setting.holds for setting in settings) else 1


if __name__ == "__main__":
    sys.exit(main())
