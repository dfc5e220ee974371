"""Run all checks in one process, which prints one finding per line as JSON. A failing import may end the process."""

from __future__ import annotations

import json
import os
from dataclasses import asdict

from megatron_wallfacer.doctor import interfaces, kernels, plugin, pytorch, variables
from megatron_wallfacer.doctor.finding import Check, run_check
from megatron_wallfacer.megatron.releases import REQUIREMENT

_TORCH, _MEGATRON = "install torch again", f"give --megatron-path, or pip install '{REQUIREMENT}'"
_NETWORK = "see ip address"
#: Name of each check, its function, and the remedy if the function raises an exception, in the order of the report.
CHECKS: tuple[tuple[str, Check, str], ...] = (
    ("python", pytorch.python, ""),
    ("torch", pytorch.torch_version, _TORCH),
    ("cuda", pytorch.cuda, _TORCH),
    ("gpus", pytorch.gpus, "see nvidia-smi; install a torch that is built for this GPU"),
    ("communication", pytorch.communication, _TORCH),
    ("megatron", plugin.megatron, _MEGATRON),
    ("kernels", kernels.kernels, _TORCH),
    ("schemes", plugin.schemes, ""),
    ("network", interfaces.network, _NETWORK),
    ("gloo interface", interfaces.gloo_interface, _NETWORK),
    ("nccl interface", interfaces.nccl_interface, _NETWORK),
    ("master address", interfaces.master_address, _NETWORK),
    ("connections", variables.connections, _TORCH),
    ("threads", variables.threads, _TORCH),
    ("restarts", variables.restarts, ""),
    ("variables", variables.others, ""),
)


def main() -> None:
    """Run all checks. Text that libraries print during their import goes to stderr."""
    output = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    with output:
        for name, check, remedy in CHECKS:
            for finding in run_check(name, check, remedy):
                print(json.dumps(asdict(finding)), file=output)


if __name__ == "__main__":
    main()
