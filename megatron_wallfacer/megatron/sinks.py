"""Softmax sinks: a logit beside the keys that takes part in the softmax and has no value.

``off-by-one`` is a sink of logit 0, ``learnable`` one parameter a head, under the name and in the checkpoint entry that
Megatron's own attention and TransformerEngine's have for it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from megatron_wallfacer.errors import WallfacerError

NAME = "softmax_offset"
TYPES = ("vanilla", "off-by-one", "learnable")


def add_sinks(module: nn.Module, config: Any, heads: int, device: torch.device, where: str) -> None:
    """Give a core attention module its ``softmax_offset``: a parameter, zeros, or None.

    Args:
        module: the core attention.
        config: Megatron's TransformerConfig.
        heads: query heads of this tensor-parallel rank.
        device: of the run.
        where: the layer, for messages.

    Raises:
        WallfacerError: a type of softmax that is not supported.
    """
    kind = getattr(config, "softmax_type", "vanilla")
    if kind not in TYPES:
        raise WallfacerError(
            f"{where}: --softmax-type {kind}: must be one of {', '.join(TYPES)} with --wallfacer-cp-size"
        )
    if kind == "vanilla":
        module.register_parameter(NAME, None)
        return
    # As Megatron's own attention makes it, so that the same seed gives the same model.
    logits = torch.empty(heads, device=device, dtype=config.params_dtype)
    if kind == "off-by-one":
        module.register_buffer(NAME, logits.zero_(), persistent=False)
        return
    module.register_parameter(NAME, nn.Parameter(logits))
    if config.perform_initialization:
        config.init_method(logits)


def sharded_sinks(
    module: nn.Module, tp_group: Any, prefix: str, sharded_offsets: Any, metadata: dict[str, Any] | None
) -> dict[str, Any]:
    """The checkpoint entry of a learnable sink: heads are divided over the tensor-parallel ranks. Else nothing."""
    if not isinstance(getattr(module, NAME), nn.Parameter):
        return {}
    from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

    # Megatron before 0.16 takes the groups from parallel_state; later ones are told.
    groups = {} if metadata is None else {"tp_group": tp_group, "dp_cp_group": metadata["dp_cp_group"]}
    state = module.state_dict(prefix="", keep_vars=True)
    return make_sharded_tensors_for_checkpoint(state, prefix, {NAME: 0}, sharded_offsets, **groups)
