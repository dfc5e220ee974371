"""Build the torchrun command that trains a preset."""

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


#: Variables that make PyTorch's flight recorder write the last operations of each process group to a file at a timeout.
#: The buffer size has two names, because PyTorch renamed the variable.
FLIGHT_RECORDER = {
    "TORCH_FR_BUFFER_SIZE": "2000",
    "TORCH_NCCL_TRACE_BUFFER_SIZE": "2000",
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
}


@dataclass(frozen=True)
class Launch:
    """Command of a training job.

    Attributes:
        command: torchrun, the plugin's launcher, the Megatron script and its arguments.
        environment: environment variables to add to the shell's environment.
    """

    command: tuple[str, ...]
    environment: dict[str, str]

    @classmethod
    def of(cls, preset: Preset, script: Path) -> Launch:
        """Return the command of a preset.

        A preset in ``configs/`` for GPUs also gets the flags that Megatron needs with the installed libraries. A GPU
        job turns on PyTorch's flight recorder. Variables of the flight recorder keep their values if the shell or the
        preset sets them.

        Raises:
            WallfacerError: The job has several nodes but no rendezvous endpoint.
        """
        argv = preset.argv
        if preset.is_shipped and preset.on_gpus:
            argv = complete_for_gpu(argv, Libraries.here())
        start = (sys.executable, "-m", "torch.distributed.run", *torchrun.torchrun_arguments(preset.torchrun))
        recorder = {name: value for name, value in FLIGHT_RECORDER.items() if name not in os.environ}
        recorder = recorder if preset.on_gpus else {}
        environment = recorder | torchrun.torchrun_variables(preset.torchrun) | preset.environment
        return cls((*start, "-m", "megatron_wallfacer", str(script), *argv), environment)

    def __str__(self) -> str:
        """Return the command as one line for a shell."""
        variables = [f"{name}={value}" for name, value in self.environment.items()]
        return shlex.join(["env", *variables, *self.command])

    def replace_this_process(self) -> NoReturn:
        """Replace this process by torchrun, so that torchrun gets a batch system's signals and sets the exit code."""
        sys.stdout.flush()
        os.execvpe(self.command[0], self.command, os.environ | self.environment)


def choose_script(script: Path | None, megatron_path: Path | None) -> Path:
    """Return the given script, else the checkout's ``pretrain_gpt.py``, else the plugin's script.

    Raises:
        WallfacerError: The script is not a file.
    """
    chosen = script or (megatron_path / "pretrain_gpt.py" if megatron_path else SCRIPT)
    if not chosen.is_file():
        raise WallfacerError(f"{chosen}: must be a file; use --script, or --megatron-path with a Megatron-LM checkout")
    return chosen


def script_to_read(script: Path | None, checkout: Path | None) -> Path | None:
    """Return the Megatron script that the preset runs; None for the plugin's script, which adds no flags."""
    chosen = choose_script(script, None) if script or not checkout else checkout / "pretrain_gpt.py"
    return None if chosen == SCRIPT else chosen


def checkout_of(script: Path | None, megatron_path: Path | None) -> Path | None:
    """Return the checkout that the job uses: ``megatron_path``, else the script's folder if it contains Megatron.

    The result None means the installed Megatron.
    """
    if megatron_path or not script:
        return megatron_path
    folder = choose_script(script, None).parent
    return folder if (folder / "megatron").is_dir() else None
