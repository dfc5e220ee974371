"""Define the training runs of ``wallfacer demo``: one small GPT on one rank and with context parallelism.

On the CPU the two training runs use fp32. On GPUs the two training runs use bf16, because no fused attention kernel
supports fp32. On GPUs a third run uses one rank, fp32 and Megatron's own layers. The losses of the fp32 run
show how much rounding to bf16 changes the loss.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_wallfacer.megatron.needed_arguments import Libraries, complete_for_gpu
from megatron_wallfacer.training_runs.loss_comparison import EXACT, WHOLE

SEQUENCE = 1024
HEADS, KV_HEADS = 8, 4

#: A small model with features of current models: GQA, RoPE, RMSNorm, SwiGLU.
MODEL = (
    "--num-layers 4 --hidden-size 128 --ffn-hidden-size 384 "
    f"--num-attention-heads {HEADS} --group-query-attention --num-query-groups {KV_HEADS} "
    "--position-embedding-type rope --normalization RMSNorm --swiglu --disable-bias-linear"
).split()

TRAINING = (
    f"--seq-length {SEQUENCE} --max-position-embeddings {SEQUENCE} --micro-batch-size 1 --global-batch-size 2 "
    "--lr 2e-3 --lr-decay-style constant --clip-grad 1.0 --weight-decay 0.1 --seed 1234 "
    "--attention-dropout 0 --hidden-dropout 0 --split 98,2,0 --eval-iters 0 --log-interval 1"
).split()


@dataclass(frozen=True)
class DemoRun:
    """One training run. ``title`` is printed when the run starts. ``flags`` follow the arguments that all runs have."""

    name: str
    title: str
    log: str
    ranks: int
    flags: tuple[str, ...]


@dataclass(frozen=True)
class DemoResult:
    """Result of the demonstration, printed by ``--json``.

    Attributes:
        losses: key: name of a run; value: its losses by iteration.
        differences: relative difference of the loss between the context-parallel run and the first run, by iteration.
        largest: largest element of ``differences``.
        allowed: largest allowed relative difference of the loss.
        agree: whether ``largest`` is at most ``allowed``.
        pictures: files of the plots.
    """

    losses: dict[str, list[float]]
    differences: list[float]
    largest: float
    allowed: float
    agree: bool
    pictures: list[str]


def demo_runs(cp_size: int, scheme: str, resolved: str, gpus: int) -> list[DemoRun]:
    """Return the runs, with the reference first and the context-parallel run last.

    If ``scheme`` is ``auto``, ``resolved`` is the scheme that ``auto`` selects. If ``gpus`` is 0, the runs use the CPU.
    """
    dtype = ("--bf16",) if gpus else ()
    flags = ("--wallfacer-cp-size", str(cp_size), "--wallfacer-scheme", scheme)
    exact = DemoRun(EXACT, "unmodified Megatron, 1 rank in fp32", "fp32.log", 1, ("--transformer-impl", "local"))
    in_dtype = " in bf16" if gpus else ""
    return [
        *([exact] if gpus else []),
        DemoRun(WHOLE, f"unmodified Megatron, 1 rank{in_dtype}", "cp1.log", 1, dtype),
        DemoRun(
            f"{cp_size} ranks, {resolved}",
            f"{' '.join(flags)}, {cp_size} ranks{in_dtype}",
            "wallfacer.log",
            cp_size,
            (*dtype, *flags),
        ),
    ]


def training_arguments(directory: Path, iterations: int) -> list[str]:
    """Build the training data, and return Megatron's arguments for the model and the data."""
    from megatron_wallfacer.megatron.version import megatron_version
    from megatron_wallfacer.training_runs.corpus import build_corpus, tokenizer_arguments

    data = ["--data-path", str(build_corpus(directory / "corpus")), *tokenizer_arguments(megatron_version()[:2])]
    return [*MODEL, *TRAINING, *data, "--train-iters", str(iterations)]


def count_gpus() -> int:
    """Return the number of GPUs that the launcher would use, or 0 if the launcher would train on the CPU."""
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def complete_arguments(arguments: list[str], gpus: int) -> list[str]:
    """On GPUs, add the flags that Megatron needs with the installed libraries. The launcher adds CPU flags."""
    return complete_for_gpu(arguments, Libraries.here()) if gpus else arguments
