"""The process that looks: it imports Megatron, and may die of what it imports. One finding a line, as JSON."""

from __future__ import annotations

import json
import os
from dataclasses import asdict

from megatron_wallfacer.doctor import interfaces as network
from megatron_wallfacer.doctor import kernels, plugin, variables
from megatron_wallfacer.doctor import pytorch as machine
from megatron_wallfacer.doctor.finding import Check, examined

_TORCH, _MEGATRON = "install torch again", "give --megatron-path, or pip install 'megatron-core[training]>=0.17,<0.20'"
_NETWORK = "see ip address"
#: Name, check, and what to do where the check cannot be made; in the order of the report.
CHECKS: tuple[tuple[str, Check, str], ...] = (
    ("python", machine.python, ""),
    ("torch", machine.torch_version, _TORCH),
    ("cuda", machine.cuda, _TORCH),
    ("gpus", machine.gpus, "see nvidia-smi; install a torch that is built for this GPU"),
    ("communication", machine.communication, _TORCH),
    ("megatron", plugin.megatron, _MEGATRON),
    ("kernels", kernels.kernels, _TORCH),
    ("schemes", plugin.schemes, ""),
    ("network", network.network, _NETWORK),
    ("gloo interface", network.gloo_interface, _NETWORK),
    ("nccl interface", network.nccl_interface, _NETWORK),
    ("master address", network.meeting_point, _NETWORK),
    ("connections", variables.connections, _TORCH),
    ("threads", variables.threads, _TORCH),
    ("restarts", variables.restarts, ""),
    ("variables", variables.others, ""),
)


def main() -> None:
    """Make every check, whatever is printed at import."""
    answer = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    with answer:
        for name, check, remedy in CHECKS:
            for finding in examined(name, check, remedy):
                print(json.dumps(asdict(finding)), file=answer)


if __name__ == "__main__":
    main()
