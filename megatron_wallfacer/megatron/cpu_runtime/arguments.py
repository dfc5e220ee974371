"""Add the Megatron arguments that a node without CUDA needs, and reject arguments that need CUDA.

Every flag in `NEEDED` exists in Megatron-LM 0.17, 0.18, 0.19 and main of 2026-08.
"""

from __future__ import annotations

from megatron_wallfacer.errors import WallfacerError
from megatron_wallfacer.megatron import needed_arguments
from megatron_wallfacer.megatron.needed_arguments import missing, read_flags

# Value (None for a switch) of each flag that is appended if the user did not give the flag.
NEEDED: dict[str, str | None] = {
    # The default, TransformerEngine, has no CPU kernels.
    "--transformer-impl": "local",
    "--distributed-backend": "gloo",
    **needed_arguments.NO_GRADIENT_FUSION,
    **needed_arguments.LOCAL_LAYERS,
    # The fusions need torch.compile, which is off here. Without it they only use more temporary tensors.
    "--no-bias-gelu-fusion": None,
    "--no-bias-dropout-fusion": None,
    "--no-bias-swiglu-fusion": None,
    **needed_arguments.EVALUATION,
    # The default is two loader processes per rank, which would compete with the ranks for CPU cores.
    "--num-workers": "0",
}

# Values that work without CUDA, by flag.
ALLOWED_VALUES: dict[str, tuple[str, ...]] = {
    "--transformer-impl": ("local",),
    "--distributed-backend": ("gloo",),
    "--attention-backend": ("auto", "unfused", "local"),
    "--cross-entropy-fusion-impl": ("native",),
    "--cuda-graph-impl": ("none",),
    "--moe-token-dispatcher-type": ("allgather", "alltoall"),
}

# Flags that need CUDA's kernels, streams or allocator with any value.
CUDA_ONLY: frozenset[str] = frozenset(
    {
        "--async-save",  # its copy "to the CPU" is the state itself here, which training changes during the save
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
    """Complete Megatron's arguments for a node without CUDA.

    Returns:
        A pair. Its first element is `argv` with the added arguments, and the second is the added arguments alone.

    Raises:
        WallfacerError: An argument needs CUDA.
    """
    for flag, value in read_flags(argv):
        problem = f"{flag if value is None else f'{flag} {value}'} needs CUDA, and this machine has none"
        if flag in CUDA_ONLY:
            raise WallfacerError(f"{problem}: leave {flag} out to run on the CPU")
        allowed = ALLOWED_VALUES.get(flag)
        # Megatron's parser reports a flag without its value.
        if allowed and value is not None and value not in allowed:
            raise WallfacerError(f"{problem}: to run on the CPU leave {flag} out or give {' or '.join(allowed)}")
    added = missing(argv, NEEDED)
    return [*argv, *added], added
