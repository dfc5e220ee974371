"""The runs of the demonstration, on a CPU and on GPUs.

On a CPU both runs are in fp32. On a GPU they are in bf16, because no fused attention kernel takes fp32. A third run
there, on one rank in fp32 with Megatron's own layers, shows how far rounding alone takes the losses apart.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_wallfacer.megatron.needed_arguments import Libraries, complete_for_gpu
from megatron_wallfacer.training_runs.loss_comparison import EXACT, WHOLE


@dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        name: in tables and pictures.
        title: of the run, printed when it starts.
        log: file name of its log.
        ranks: processes.
        flags: arguments beside those of all runs.
    """

    name: str
    title: str
    log: str
    ranks: int
    flags: tuple[str, ...]


def runs_of(cp_size: int, scheme: str, resolved: str, gpus: int) -> list[Run]:
    """List the runs, the reference first and the split run last.

    Args:
        cp_size: context-parallel ranks of the split run.
        scheme: value of `--wallfacer-scheme`.
        resolved: scheme that this value stands for.
        gpus: GPUs of this machine; 0 for the CPU.
    """
    dtype = ("--bf16",) if gpus else ()
    split = ("--wallfacer-cp-size", str(cp_size), "--wallfacer-scheme", scheme)
    exact = Run(EXACT, "Megatron as it is, 1 rank in fp32", "fp32.log", 1, ("--transformer-impl", "local"))
    in_dtype = " in bf16" if gpus else ""
    return [
        *([exact] if gpus else []),
        Run(WHOLE, f"Megatron as it is, 1 rank{in_dtype}", "cp1.log", 1, dtype),
        Run(
            f"{cp_size} ranks, {resolved}",
            f"{' '.join(split)}, {cp_size} ranks{in_dtype}",
            "wallfacer.log",
            cp_size,
            (*dtype, *split),
        ),
    ]


def gpus_here() -> int:
    """Count the GPUs that the launcher would train on; 0 where it takes the CPU."""
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def complete(arguments: list[str], gpus: int) -> list[str]:
    """Complete the arguments of a run for this machine; the launcher does it itself for CPU ranks."""
    return complete_for_gpu(arguments, Libraries.here()) if gpus else arguments
