"""What Megatron's arguments must say on a machine without CUDA.

Every flag in `NEEDED` exists in Megatron-LM 0.17, 0.18, 0.19 and main of 2026-08.
"""

from __future__ import annotations

from megatron_wallfacer.errors import WallfacerError
from megatron_wallfacer.megatron.needed_arguments import (
    EVALUATION,
    LOCAL_LAYERS,
    NO_GRADIENT_FUSION,
    missing,
    read_flags,
)

# Appended when the user did not give them: flag -> value, None for a switch.
NEEDED: dict[str, str | None] = {
    # TransformerEngine, the default, has no CPU kernels.
    "--transformer-impl": "local",
    "--distributed-backend": "gloo",
    **NO_GRADIENT_FUSION,
    **LOCAL_LAYERS,
    # Written for torch.compile, which is off here: eager, they are the plain functions with more temporaries.
    "--no-bias-gelu-fusion": None,
    "--no-bias-dropout-fusion": None,
    "--no-bias-swiglu-fusion": None,
    **EVALUATION,
    # The default is two loader processes a rank, next to ranks that already share the cores.
    "--num-workers": "0",
}

# Flags whose value decides: flag -> the values that work here.
ALLOWED_VALUES: dict[str, tuple[str, ...]] = {
    "--transformer-impl": ("local",),
    "--distributed-backend": ("gloo",),
    "--attention-backend": ("auto", "unfused", "local"),
    "--cross-entropy-fusion-impl": ("native",),
    "--cuda-graph-impl": ("none",),
    "--moe-token-dispatcher-type": ("allgather", "alltoall"),
}

# Flags that mean kernels, streams or an allocator of CUDA whatever their value.
CUDA_ONLY: frozenset[str] = frozenset(
    {
        "--async-save",  # copies the state "to the CPU", which here is the state itself, while training changes it
        "--batch-invariant-mode",
        "--cpu-offloading-num-layers",
        "--enable-cuda-graph",
        "--external-cuda-graph",
        "--fine-grained-activation-offloading",
        "--flash-attention-version",
        "--fp4-format",
        "--fp4-param-gather",
        "--fp8-format",
        "--fp8-param-gather",
        "--fused-residual-rmsnorm",
        "--inprocess-restart",
        "--moe-enable-deepep",
        "--moe-grouped-gemm",
        "--moe-permute-fusion",
        "--moe-router-fusion",
        "--nccl-communicator-config-path",
        "--optimizer-cpu-offload",
        "--optimizer-cuda-graph",
        "--pipeline-model-parallel-comm-backend",  # nccl or ucc
        "--symmetric-ar-type",
        "--te-precision-config-file",
        "--te-rng-tracker",
        "--tp-comm-overlap",
        "--use-flash-attn",
        "--use-megatron-fsdp",
        "--use-nccl-ub",
        "--use-sharp",
        "--use-te-activation-func",
    }
)


def adapt_argv(argv: list[str]) -> tuple[list[str], list[str]]:
    """Complete Megatron's arguments for a machine without CUDA.

    Args:
        argv: The user's arguments, without the script's path.

    Returns:
        `argv` with what a CPU needs appended where the user did not say it, and the appended part alone.

    Raises:
        WallfacerError: The user asked for something that needs CUDA. One line: flag, value, what is possible.
    """
    for flag, value in read_flags(argv):
        _check(flag, value)
    added = missing(argv, NEEDED)
    return [*argv, *added], added


def _check(flag: str, value: str | None) -> None:
    """Refuse what cannot be done without CUDA.

    Raises:
        WallfacerError: `flag`, or this value of it, needs CUDA.
    """
    given = flag if value is None else f"{flag} {value}"
    if flag in CUDA_ONLY:
        raise WallfacerError(f"{given} needs CUDA, and this machine has none: leave {flag} out to run on the CPU")
    allowed = ALLOWED_VALUES.get(flag)
    # A flag without its value is an error that Megatron's parser words better.
    if allowed and value is not None and value not in allowed:
        raise WallfacerError(
            f"{given} needs CUDA, and this machine has none: "
            f"to run on the CPU leave {flag} out or give {' or '.join(allowed)}"
        )
