"""Megatron's own validation of presets that are meant for GPUs, where there are none: in a process of its own.

    python -m tests.presets.validate PRESET ...

The CPU runtime answers for the devices that the validation asks about. Each preset has a fork: Megatron keeps state.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

from megatron_wallfacer.megatron import cpu_runtime
from megatron_wallfacer.megatron.hooks import Hooks
from megatron_wallfacer.megatron.parser_process import _StateWithoutDevice
from megatron_wallfacer.megatron.version import megatron_version
from megatron_wallfacer.presets.preset import load_preset


def main(files: list[str]) -> None:
    cpu_runtime.install()
    Hooks(_StateWithoutDevice(megatron_version(), torch.device("cuda"))).install()
    from megatron.training.arguments import parse_and_validate_args

    for file in files:
        pid = os.fork()
        if pid == 0:
            preset = load_preset(Path(file))
            os.environ.update(preset.environment | {"WORLD_SIZE": str(preset.ranks), "RANK": "0"})
            sys.argv = ["pretrain_gpt.py", *preset.argv]
            args = parse_and_validate_args()
            print(Path(file).stem, args.data_parallel_size, args.context_parallel_size, args.eval_interval, flush=True)
            os._exit(0)
        _, status = os.waitpid(pid, 0)
        if status:
            sys.exit(f"{file}: rejected")


if __name__ == "__main__":
    main(sys.argv[1:])
