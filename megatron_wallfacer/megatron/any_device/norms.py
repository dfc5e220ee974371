"""Norms without TransformerEngine.

A norm of TransformerEngine or Apex marks its parameters `sequence_parallel`. Megatron then sums their gradients over
the tensor-parallel group (finalize_model_grads.py), because each rank normalised other tokens. Torch's norms carry no
such mark, so `WrappedTorchNorm` (megatron/core/transformer/torch_norm.py) rejects sequence parallelism. Here they get
it.

Apex's norm, `FusedLayerNorm`, is a LayerNorm only. With Apex and without TransformerEngine `TransformerBlock` takes it
for the final norm of every model, and a model with RMSNorm cannot be built. Here torch's RMSNorm takes its place.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from megatron_wallfacer.megatron.replace import wrap


def install() -> None:
    """Wrap both constructors."""
    wrap("megatron.core.transformer.torch_norm.WrappedTorchNorm.__new__", _marking)
    wrap("megatron.core.fusions.fused_layer_norm.FusedLayerNorm.__new__", _layer_norm_only)


def _marking(original: Callable[..., Any]) -> staticmethod:
    """Return a constructor that marks the parameters where `original` raises an error."""

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


def _layer_norm_only(original: Callable[..., Any]) -> staticmethod:
    """A constructor of Apex's norm, or of torch's where the model has another norm than Apex."""

    def build(cls: type, config: Any, *args: Any, **kwargs: Any) -> Any:
        """The norm; what is of another class is built by then, and its constructor is not called."""
        if config.normalization == "LayerNorm":
            return original(cls)
        from megatron.core.transformer.torch_norm import WrappedTorchNorm

        return WrappedTorchNorm(config, *args, **kwargs)

    return staticmethod(build)
