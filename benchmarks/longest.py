"""The longest sequences that docs/planning.md shows, beside published ones: ``python -m benchmarks.longest``.

Each row is ``wallfacer plan --max-seq`` for some H100. Nothing is measured.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from benchmarks.gpu.tables import markdown, markdown_line
from megatron_wallfacer.planning.cluster import Cluster
from megatron_wallfacer.planning.cluster_file import load_cluster
from megatron_wallfacer.planning.configuration import Request
from megatron_wallfacer.planning.longest import LongestSequence, longest_sequences
from megatron_wallfacer.planning.model import model_named
from megatron_wallfacer.planning.plan_reports import limit_of_longer

MODELS, DEVICES = ("llama3-8b", "llama3-70b"), (1, 8, 64)
HEADING = (
    "model",
    "H100",
    "tokens",
    "s per step, MFU",
    "tokens with Adam on the host",
    "s per step, MFU",
    "published tokens",
    "what a longer one needs",
)
#: Published lengths by model and devices: ALST (arXiv 2506.13996), UPipe (arXiv 2602.21196).
PUBLISHED = {("llama3-8b", 1): "500K (ALST)", ("llama3-8b", 8): "3.7M (ALST), 5M (UPipe)"}


def cluster_of(devices: int) -> Cluster:
    """Return so many H100 in nodes of 8."""
    cluster = load_cluster("h100-8x8", max(1, devices // 8))
    return cluster if devices >= cluster.gpus_per_node else cluster.with_gpus_per_node(devices)


def row(model: str, devices: int) -> str:
    """Return one line of the table."""
    found = longest_sequences(Request(model_named(model), cluster_of(devices), 1, optimizers="all"))
    plain = next((one for one in found if one.configuration.has_plain_optimizer), None)
    other = next((one for one in found if not one.configuration.has_plain_optimizer), None)
    published = PUBLISHED.get((model, devices), "-")
    stops = limit_of_longer(found[-1]) if found else "weights and gradients alone do not fit"
    return markdown_line((model, devices, *_cells(plain), *_cells(other), published, stops))


def _cells(found: LongestSequence | None) -> tuple[str, str]:
    if found is None:
        return "-", "-"
    step = found.configuration.step
    return f"{found.configuration.request.tokens:,}", f"{step.seconds:.0f} s, {100 * step.mfu:.1f} %"


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.longest", description=__doc__.partition("\n")[0])
    parser.add_argument("--model", choices=MODELS, help="one of them")
    parser.add_argument("--devices", type=int, choices=DEVICES, help="one number of H100")
    options = parser.parse_args(argv)
    print(markdown(HEADING, ()), flush=True)
    for model in MODELS if options.model is None else (options.model,):
        for devices in DEVICES if options.devices is None else (options.devices,):
            print(row(model, devices), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
