"""Compute multi-token prediction (MTP) losses over the tokens of a context-parallel group.

Megatron divides the losses of the MTP layers by the number of unmasked tokens of one rank, with and without
``--calculate-per-token-loss`` (NVIDIA/Megatron-LM#7498). Ranks differ in this number even without a loss mask, because
the last token of a sequence predicts nothing and is on a single rank. Megatron also shifts the tokens of packed
documents at wrong boundaries if documents have padding (NVIDIA/Megatron-LM#4495).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_wallfacer.megatron.hook import Hook, bound
from megatron_wallfacer.megatron.hooks.loss import sum_over_group
from megatron_wallfacer.megatron.packed import as_laid_out
from megatron_wallfacer.megatron.plugin_state import PluginState
from megatron_wallfacer.megatron.releases import FIRST_LAUNCHED


@partial(
    Hook,
    name="MTP loss",
    purpose="takes mean losses of multi-token prediction over the whole context-parallel group",
    target="megatron.core.models.gpt.gpt_model:process_mtp_loss",
    since=FIRST_LAUNCHED,
    parameters=("labels", "loss_mask", "compute_language_model_loss", "config", "cp_group", "packed_seq_params"),
)
def mtp_loss_hook(state: PluginState, original: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    """Compute MTP losses with means over the tokens of the context-parallel group.

    The hook multiplies each loss by P, because Megatron divides by the number of tokens of the whole group and then
    averages gradients over P ranks. With ``--calculate-per-token-loss`` Megatron multiplies the mean MTP loss by the
    rank's number of unmasked tokens. The hook uses the mean of this number over the ranks of the group instead.
    """
    call = bound(original, *args, **kwargs)
    call.apply_defaults()
    values = call.arguments
    group, config = values["cp_group"], values["config"]
    if group is None or group.size() == 1 or not _derive_labels(values):
        return original(*call.args, **call.kwargs)
    mask = values["loss_mask"]
    mask = torch.ones_like(values["labels"], dtype=torch.float32) if mask is None else mask.float()
    losses = values["compute_language_model_loss"]
    values |= {
        "loss_mask": mask,
        "config": _weighted(config, mask, group) if config.calculate_per_token_loss else config,
        "compute_language_model_loss": lambda *args, **kwargs: losses(*args, **kwargs) * group.size(),
    }
    # Megatron calls roll_tensor to shift the mask and to count its tokens.
    state.mtp_group = group
    try:
        return original(*call.args, **call.kwargs)
    finally:
        state.mtp_group = None


@partial(
    Hook,
    name="MTP shift",
    purpose="shifts padded documents by their padded lengths",
    target="megatron.core.transformer.multi_token_prediction:roll_tensor",
    since=FIRST_LAUNCHED,
    parameters=("packed_seq_params",),
)
def mtp_shift_hook(state: PluginState, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Return the shifted tensor ``[batch, tokens / P]`` and the sum of its elements.

    The shift uses document boundaries that include padding. During an MTP loss the function sums a mask over the
    context-parallel group, because the shift changes each rank's number of unmasked tokens.
    """
    call = bound(original, *args, **kwargs)
    if call.arguments.get("packed_seq_params") is not None:
        call.arguments["packed_seq_params"] = as_laid_out(call.arguments["packed_seq_params"])
    rolled, total = original(*call.args, **call.kwargs)
    # Masks are floating point. Tokens and labels are integers, and Megatron ignores their sums.
    if state.mtp_group is None or total is None or not rolled.is_floating_point():
        return rolled, total
    return rolled, sum_over_group(total, state.mtp_group).clamp(min=1)


def _derive_labels(values: dict[str, Any]) -> bool:
    """Return whether there are labels. Without labels (reinforcement learning) derive the labels from the tokens."""
    # Megatron derives labels inside the wrapped function, which is too late to read the mask of the main loss.
    if values["labels"] is not None:
        return True
    tokens = values.get("input_ids")
    if tokens is None:
        return False
    from megatron.core.transformer import multi_token_prediction

    mask = values["loss_mask"]
    mask = torch.ones_like(tokens, dtype=torch.float32) if mask is None else mask
    options = {"cp_group": values["cp_group"], "packed_seq_params": values["packed_seq_params"]}
    values["labels"], values["loss_mask"] = (
        multi_token_prediction.roll_tensor(x, shifts=-1, dims=-1, **options)[0] for x in (tokens, mask)
    )
    return True


def _weighted(config: Any, mask: Tensor, group: dist.ProcessGroup) -> Any:
    """Return a copy of ``config`` with another MTP loss scale.

    The scale is multiplied by the mean number of unmasked tokens per rank of ``group``.
    """
    weighted = copy.copy(config)
    weighted.calculate_per_token_loss = False
    weighted.mtp_loss_scaling_factor = config.mtp_loss_scaling_factor * sum_over_group(mask.sum(), group) / group.size()
    return weighted
