"""From a preset to the process that trains."""

from __future__ import annotations

import os
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from megatron_wallfacer.errors import WallfacerError
from megatron_wallfacer.megatron.needed_arguments import Libraries, complete_for_gpu
from megatron_wallfacer.presets import torchrun
from megatron_wallfacer.shipped import SCRIPT

if TYPE_CHECKING:
    from megatron_wallfacer.presets.preset import Preset


#: PyTorch's record of the last operations of each process group, which it writes at a timeout. Two names of one size:
#: before and since PyTorch renamed it.
FLIGHT_RECORDER = {
    "TORCH_FR_BUFFER_SIZE": "2000",
    "TORCH_NCCL_TRACE_BUFFER_SIZE": "2000",
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
}


@dataclass(frozen=True)
class Launch:
    """A command and what it shall find in its environment.

    Attributes:
        command: torchrun, the plugin's launcher, the script, its arguments.
        environment: variables to set beside those that are there.
    """

    command: tuple[str, ...]
    environment: dict[str, str]

    @classmethod
    def of(cls, preset: Preset, script: Path) -> Launch:
        """Render a preset; one for GPUs that comes with the plugin is completed for the libraries of this machine.

        On GPUs PyTorch's flight recorder is on, unless a variable or the preset says otherwise.

        Raises:
            WallfacerError: there are several nodes, and nothing says where they meet.
        """
        argv = preset.argv
        if preset.is_shipped and preset.on_gpus:
            argv = complete_for_gpu(argv, Libraries.here())
        start = (sys.executable, "-m", "torch.distributed.run", *torchrun.words(preset.torchrun))
        recorder = {name: value for name, value in FLIGHT_RECORDER.items() if name not in os.environ}
        recorder = recorder if preset.on_gpus else {}
        environment = recorder | torchrun.variables(preset.torchrun) | preset.environment
        return cls((*start, "-m", "megatron_wallfacer", str(script), *argv), environment)

    def __str__(self) -> str:
        """One line for a shell."""
        variables = [f"{name}={value}" for name, value in self.environment.items()]
        return shlex.join(["env", *variables, *self.command])

    def replace_this_process(self) -> NoReturn:
        """Become the command: signals of a batch system then reach torchrun, and its exit code is this one's."""
        sys.stdout.flush()
        os.execvpe(self.command[0], self.command, os.environ | self.environment)


def choose_script(script: Path | None, megatron_path: Path | None) -> Path:
    """The Megatron script to run: the named one, that of the checkout, or the plugin's own.

    Raises:
        WallfacerError: there is no such file.
    """
    chosen = script or (megatron_path / "pretrain_gpt.py" if megatron_path else SCRIPT)
    if not chosen.is_file():
        raise WallfacerError(f"{chosen} is not a file; give --script, or --megatron-path with a Megatron-LM checkout")
    return chosen
