"""Add softmax sinks: a logit per query head that takes part in the softmax like a key but has no value.

``off-by-one`` is a sink with logit 0. With ``learnable`` the logits are parameters, one per query head. Checkpoints
have them under the same name as Megatron's own attention and TransformerEngine.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from megatron_wallfacer.errors import WallfacerError

NAME = "softmax_offset"
TYPES = ("vanilla", "off-by-one", "learnable")


def add_sinks(module: nn.Module, config: Any, heads: int, device: torch.device, where: str) -> None:
    """Add ``softmax_offset`` to a core attention module: a parameter or a buffer ``[q_heads]``, or None.

    Raises:
        WallfacerError: The plugin does not support the type of softmax.
    """
    kind = getattr(config, "softmax_type", "vanilla")
    if kind not in TYPES:
        raise WallfacerError(
            f"{where}: --softmax-type {kind}: must be one of {', '.join(TYPES)} with --wallfacer-cp-size"
        )
    if kind == "vanilla":
        module.register_parameter(NAME, None)
        return
    # Same calls as in Megatron's own attention, so that the same seed gives the same model.
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
    """Return the checkpoint entry of learnable sinks, sharded by heads over tensor-parallel ranks, or an empty dict."""
    if not isinstance(getattr(module, NAME), nn.Parameter):
        return {}
    from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

    # Megatron before 0.16 reads the groups from parallel_state. Later releases have arguments for them.
    groups = {} if metadata is None else {"tp_group": tp_group, "dp_cp_group": metadata["dp_cp_group"]}
    state = module.state_dict(prefix="", keep_vars=True)
    return make_sharded_tensors_for_checkpoint(state, prefix, {NAME: 0}, sharded_offsets, **groups)
