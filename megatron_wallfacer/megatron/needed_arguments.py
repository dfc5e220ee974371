"""What Megatron's arguments must say, on any device, where a library is missing; and shipped command lines with it.

`validate_args` does not check most of it: the configuration, the model's layers, the first step or the data sets do.
Every flag here exists in Megatron-LM 0.17, 0.18, 0.19 and main of 2026-08.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

#: Flag -> value, None for a switch.
Flags = Mapping[str, str | None]

#: The default, None, stops build_train_valid_test_data_iterators at `train_iters // eval_interval`.
EVALUATION: Flags = {"--eval-interval": "1000"}
#: For `--transformer-impl local`, with nothing but torch. Apex has the first two, TransformerEngine the third.
LOCAL_LAYERS: Flags = {
    # WrappedTorchNorm, when a layer is built. TransformerBlock and RMSNorm take it with Apex, too.
    "--no-persist-layer-norm": None,
    # FusedScaleMaskSoftmax imports Apex's kernel in its first forward, in bf16 and fp16.
    "--no-masked-softmax-fusion": None,
    # TransformerConfig, when it is made.
    "--no-rope-fusion": None,
}
#: ColumnParallelLinear, the output layer also of a model with TransformerEngine's layers, when it is built.
NO_GRADIENT_FUSION: Flags = {"--no-gradient-accumulation-fusion": None}

IMPLEMENTATION = "--transformer-impl"
#: `validate_args` wants it with tensor or context parallelism before Blackwell.
GPU_VARIABLES = {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}


@dataclass(frozen=True)
class Libraries:
    """Which libraries of Megatron can be imported.

    Attributes:
        transformer_engine: layers, norms, fused RoPE, Adam.
        gradient_fusion: Apex's `fused_weight_gradient_mlp_cuda`.
    """

    transformer_engine: bool
    gradient_fusion: bool

    @classmethod
    def here(cls) -> Libraries:
        """Look them up in this environment, without importing them."""
        names = ("transformer_engine", "fused_weight_gradient_mlp_cuda")
        return cls(*(importlib.util.find_spec(name) is not None for name in names))


def complete_for_gpu(argv: Sequence[str], libraries: Libraries) -> list[str]:
    """Complete a shipped command line so that it starts on a GPU.

    Args:
        argv: Megatron's arguments, without the script's path.
        libraries: libraries of the machine that trains.

    Returns:
        `argv`, and behind it each flag that it lacks and that Megatron needs there.
    """
    given = dict(read_flags(argv))
    default = {} if libraries.transformer_engine else {IMPLEMENTATION: "local"}
    local = (default | given).get(IMPLEMENTATION) == "local"
    fusion = {} if libraries.gradient_fusion else NO_GRADIENT_FUSION
    return [*argv, *missing(argv, {**default, **EVALUATION, **(LOCAL_LAYERS if local else {}), **fusion})]


def missing(argv: Sequence[str], needed: Flags) -> list[str]:
    """Words for each flag of `needed` that `argv` does not have, whatever its value there."""
    given = {flag for flag, _ in read_flags(argv)}
    words: list[str] = []
    for flag, value in needed.items():
        if flag not in given:
            words += [flag] if value is None else [flag, value]
    return words


def read_flags(argv: Sequence[str]) -> list[tuple[str, str | None]]:
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
