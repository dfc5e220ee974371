"""Sequence parallelism with torch's norms.

On a GPU the norm of Transformer Engine or Apex marks its parameters `sequence_parallel`, and Megatron then sums their
gradients over the tensor-parallel group (finalize_model_grads.py), since each rank normalised other tokens.
`WrappedTorchNorm` (megatron/core/transformer/torch_norm.py), the only one on a CPU, refuses sequence parallelism
because torch's norms do not carry that mark. Here they get it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from megatron_wallfacer.megatron.cpu_runtime.replace import wrap


def install() -> None:
    """Wrap the constructor."""
    wrap("megatron.core.transformer.torch_norm.WrappedTorchNorm.__new__", _marking)


def _marking(original: Callable[..., Any]) -> staticmethod:
    """A constructor that marks the parameters where `original` would refuse."""

    def build(cls: type, config: Any, *args: Any, **kwargs: Any) -> Any:
        """The norm that Megatron builds without sequence parallelism, its parameters marked."""
        if not config.sequence_parallel:
            return original(cls, config, *args, **kwargs)
        plain = copy.copy(config)
        plain.sequence_parallel = False
        norm = original(cls, plain, *args, **kwargs)
        for parameter in norm.parameters():
            parameter.sequence_parallel = True
        return norm

    return staticmethod(build)
