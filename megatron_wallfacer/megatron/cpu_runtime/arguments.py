"""What Megatron's arguments must say on a machine without CUDA.

Every flag in `NEEDED` exists in Megatron-LM 0.17, 0.18, 0.19 and main of 2026-08.
"""

from __future__ import annotations

from megatron_wallfacer.errors import WallfacerError

# Appended when the user did not give them: flag -> value, None for a switch.
NEEDED: dict[str, str | None] = {
    # Transformer Engine, the default, has no CPU kernels.
    "--transformer-impl": "local",
    "--distributed-backend": "gloo",
    # Kernels of Apex, or of Megatron itself, written in CUDA.
    "--no-gradient-accumulation-fusion": None,
    "--no-masked-softmax-fusion": None,
    "--no-rope-fusion": None,
    # torch's norms, the only ones here, refuse it (WrappedTorchNorm).
    "--no-persist-layer-norm": None,
    # Written for torch.compile, which is off here: eager, they are the plain functions with more temporaries.
    "--no-bias-gelu-fusion": None,
    "--no-bias-dropout-fusion": None,
    "--no-bias-swiglu-fusion": None,
    # The default, None, stops build_train_valid_test_data_iterators at `train_iters // eval_interval`.
    "--eval-interval": "1000",
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
    given = _flags(argv)
    for flag, value in given:
        _check(flag, value)
    names = {flag for flag, _ in given}
    added: list[str] = []
    for flag, value in NEEDED.items():
        if flag not in names:
            added += [flag] if value is None else [flag, value]
    return [*argv, *added], added


def _flags(argv: list[str]) -> list[tuple[str, str | None]]:
    """Each `--flag` with the word that follows it, if that is not a flag: `--flag value` and `--flag=value`."""
    flags: list[tuple[str, str | None]] = []
    for position, word in enumerate(argv):
        if not word.startswith("--"):
            continue
        flag, equals, value = word.partition("=")
        if equals:
            flags.append((flag, value))
            continue
        following = argv[position + 1] if position + 1 < len(argv) else "--"
        flags.append((flag, None if following.startswith("--") else following))
    return flags


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
