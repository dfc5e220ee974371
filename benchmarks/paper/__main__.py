"""Print published results next to predicted ones: ``python -m benchmarks.paper figure-7``.

``figure-7`` and ``figure-9`` are the WallFacer paper's, ``others`` are other systems' results. ``scaling`` has no
published counterpart: it predicts one attention layer on up to 65,536 devices, and takes minutes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from benchmarks.paper.tables import print_figure, print_others, print_scaling
from megatron_wallfacer.errors import WallfacerError
from megatron_wallfacer.planning.cluster_file import load_cluster


def main(argv: Sequence[str] | None = None) -> int:
    """Print one evaluation.

    Returns:
        0, or 2 with one line on stderr where the cluster is not usable.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.paper", description=__doc__.partition("\n")[0])
    parser.add_argument("evaluation", choices=("figure-7", "figure-9", "others", "scaling"), help="results to print")
    parser.add_argument("--cluster", default="h100-8x8", help="cluster of `scaling` (default: h100-8x8)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    options = parser.parse_args(argv)
    try:
        if options.evaluation == "scaling":
            print_scaling(load_cluster(options.cluster), as_json=options.json)
        elif options.evaluation == "others":
            print_others(as_json=options.json)
        else:
            print_figure(int(options.evaluation.removeprefix("figure-")), as_json=options.json)
    except WallfacerError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
