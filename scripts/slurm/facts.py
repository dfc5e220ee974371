"""What pretrain_gpt.sbatch has to know of a preset: lines of NAME=VALUE.

python -m scripts.slurm.facts CONFIG [--megatron-flag value ...]
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_wallfacer.errors import WallfacerError
from megatron_wallfacer.presets import torchrun
from megatron_wallfacer.presets.preset import Preset, load_preset

#: The sbatch script gives these itself, so that a requeued job finds what it left.
ITS_OWN = ("--save", "--load")


def facts(preset: Preset) -> dict[str, str]:
    """Counts of nodes and ranks, of the GPUs that a node must have, and the save interval if the preset has one.

    Raises:
        WallfacerError: it has a flag that is the sbatch script's.
    """
    for flag in ITS_OWN:
        if flag in preset.model:
            raise WallfacerError(f"{preset.location(flag)}: {flag}: on Slurm, set the variable CHECKPOINT_DIR instead")
    ranks_per_node = _word(preset, torchrun.RANKS_PER_NODE, "1")
    on_cpu = preset.environment.get("CUDA_VISIBLE_DEVICES") == ""
    return {
        "nodes": _word(preset, torchrun.NODES, "1"),
        "ranks_per_node": ranks_per_node,
        "gpus_per_node": "0" if on_cpu else ranks_per_node,
        "save_interval": preset.model["--save-interval"].values[0] if "--save-interval" in preset.model else "",
    }


def _word(preset: Preset, flag: str, default: str) -> str:
    entry = preset.torchrun.get(flag)
    return entry.values[0] if entry and entry.values else default


def main(argv: Sequence[str]) -> int:
    """Print them."""
    try:
        found = facts(load_preset(Path(argv[0]), argv[1:]))
    except WallfacerError as error:
        print(f"wallfacer: error: {error}", file=sys.stderr)
        return 2
    print("\n".join(f"{name}={value}" for name, value in found.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
