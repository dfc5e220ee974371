"""List the Megatron arguments that are needed when a library is missing, and add them to the shipped command lines.

Megatron's `validate_args` checks few of these arguments. If one of the others is missing, Megatron fails later: in the
configuration, in a layer, in the first step or in the data sets. Every flag in this module exists in Megatron-LM 0.17,
0.18, 0.19 and main of 2026-08.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

#: Value of each flag, or None for a switch.
Flags = Mapping[str, str | None]

#: build_train_valid_test_data_iterators fails at `train_iters // eval_interval` with the default None.
EVALUATION: Flags = {"--eval-interval": "1000"}
#: Flags for `--transformer-impl local` with torch alone. The first two fusions need Apex, the third TransformerEngine.
LOCAL_LAYERS: Flags = {
    # WrappedTorchNorm requires the flag when a layer is built. Apex norms accept it too.
    "--no-persist-layer-norm": None,
    # FusedScaleMaskSoftmax imports Apex's kernel in its first forward in bf16 or fp16.
    "--no-masked-softmax-fusion": None,
    # TransformerConfig requires the flag.
    "--no-rope-fusion": None,
}
#: ColumnParallelLinear requires the flag. A model with TransformerEngine's layers uses it as its output layer.
NO_GRADIENT_FUSION: Flags = {"--no-gradient-accumulation-fusion": None}

IMPLEMENTATION = "--transformer-impl"
#: `validate_args` requires the variable with tensor or context parallelism on GPUs before Blackwell.
GPU_VARIABLES = {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}


@dataclass(frozen=True)
class Libraries:
    """Optional libraries of Megatron.

    Attributes:
        transformer_engine: whether TransformerEngine is installed.
        gradient_fusion: whether Apex's `fused_weight_gradient_mlp_cuda` is installed.
    """

    transformer_engine: bool
    gradient_fusion: bool

    @classmethod
    def here(cls) -> Libraries:
        """Return the libraries of this environment without importing them."""
        names = ("transformer_engine", "fused_weight_gradient_mlp_cuda")
        return cls(*(importlib.util.find_spec(name) is not None for name in names))


def complete_for_gpu(argv: Sequence[str], libraries: Libraries) -> list[str]:
    """Add flags to a command line of this package, so that Megatron starts on a GPU.

    Returns:
        `argv` followed by each needed flag that `argv` lacks.
    """
    given = dict(read_flags(argv))
    default = {} if libraries.transformer_engine else {IMPLEMENTATION: "local"}
    local = (default | given).get(IMPLEMENTATION) == "local"
    fusion = {} if libraries.gradient_fusion else NO_GRADIENT_FUSION
    return [*argv, *missing(argv, {**default, **EVALUATION, **(LOCAL_LAYERS if local else {}), **fusion})]


def missing(argv: Sequence[str], needed: Flags) -> list[str]:
    """Return the flags of `needed` that are absent from `argv`, as a list of command-line arguments."""
    given = {flag for flag, _ in read_flags(argv)}
    absent = ((flag, value) for flag, value in needed.items() if flag not in given)
    return [word for words in absent for word in words if word is not None]


def read_flags(argv: Sequence[str]) -> list[tuple[str, str | None]]:
    """Return each flag with its value or None, from words of the form `--flag value` or `--flag=value`."""
    flags: list[tuple[str, str | None]] = []
    for word, following in pairwise([*argv, "--"]):
        if word.startswith("--"):
            flag, equals, value = word.partition("=")
            flags.append((flag, value if equals else None if following.startswith("--") else following))
    return flags
