"""Support sequence parallelism and RMSNorm without TransformerEngine.

With sequence parallelism each rank normalises different tokens. For parameters with the attribute `sequence_parallel`
Megatron therefore sums gradients over the tensor-parallel group (finalize_model_grads.py). Norms of TransformerEngine
and Apex set this attribute. Torch's norms do not, so `WrappedTorchNorm` (megatron/core/transformer/torch_norm.py)
rejects sequence parallelism. This module sets `sequence_parallel` on the parameters of torch's norms.

With Apex and without TransformerEngine, `TransformerBlock` uses Apex's `FusedLayerNorm` as the final norm of every
model. `FusedLayerNorm` supports only LayerNorm, so a model with RMSNorm cannot be built. This module builds torch's
RMSNorm in place of `FusedLayerNorm` if the model has RMSNorm.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from megatron_wallfacer.megatron.replace import wrap


def install() -> None:
    """Wrap the constructors of `WrappedTorchNorm` and `FusedLayerNorm`."""
    wrap("megatron.core.transformer.torch_norm:WrappedTorchNorm.__new__", _marking)
    wrap("megatron.core.fusions.fused_layer_norm:FusedLayerNorm.__new__", _layer_norm_only)


def _marking(original: Callable[..., Any]) -> staticmethod:
    def build(cls: type, config: Any, *args: Any, **kwargs: Any) -> Any:
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
    def build(cls: type, config: Any, *args: Any, **kwargs: Any) -> Any:
        if config.normalization == "LayerNorm":
            return original(cls)
        # Python does not call __init__ on an object of another class, so the returned norm must be complete.
        from megatron.core.transformer.torch_norm import WrappedTorchNorm

        return WrappedTorchNorm(config, *args, **kwargs)

    return staticmethod(build)
