"""Compute multi-token prediction (MTP) losses over the tokens of a context-parallel group.

Megatron divides the losses of the MTP layers by the number of unmasked tokens of one rank, with and without
``--calculate-per-token-loss`` (NVIDIA/Megatron-LM#7498). The ranks of a group have different numbers of unmasked tokens
even without a mask, because only one rank has the last token, which predicts nothing. Megatron also shifts packed
tokens by document lengths without padding, although the tensors include the padding (NVIDIA/Megatron-LM#4495).
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_wallfacer.megatron.loss import sum_over_group
from megatron_wallfacer.megatron.packed import as_laid_out

Roll = Callable[..., tuple[Tensor | None, Tensor | None]]


class GroupCounts:
    """Wrappers of Megatron's functions ``process_mtp_loss`` and ``roll_tensor``.

    Megatron's loss calls ``roll_tensor`` to shift the mask and count its tokens. Inside the wrapped loss, the wrapped
    ``roll_tensor`` counts tokens over the group, because shifting changes the number of tokens of a rank's mask.
    """

    def __init__(self) -> None:
        # Group over which roll_tensor counts unmasked tokens, or None outside of process_mtp_loss.
        self._group: dist.ProcessGroup | None = None

    def wrap_roll(self, original: Roll) -> Roll:
        """Return Megatron's ``roll_tensor`` with padded boundaries of documents and, in the loss, with group counts.

        Args:
            original: function that shifts a tensor ``[batch, tokens / P]`` and returns (shifted tensor, its sum).
        """
        signature = inspect.signature(original)

        def roll_tensor(*args: Any, **kwargs: Any) -> tuple[Tensor | None, Tensor | None]:
            call = signature.bind(*args, **kwargs)
            if call.arguments.get("packed_seq_params") is not None:
                call.arguments["packed_seq_params"] = as_laid_out(call.arguments["packed_seq_params"])
            rolled, total = original(*call.args, **call.kwargs)
            # Masks are floating point. Tokens and labels are integers, and Megatron ignores their sums.
            if self._group is None or total is None or not rolled.is_floating_point():
                return rolled, total
            return rolled, sum_over_group(total, self._group).clamp(min=1)

        return roll_tensor

    def wrap_loss(self, original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Return Megatron's ``process_mtp_loss`` with means over the tokens of the context-parallel group.

        The wrapper multiplies each loss by P, because Megatron averages gradients over P ranks although the count here
        covers all P ranks. With per-token loss Megatron multiplies the MTP mean by the main loss's token count, for
        which the wrapper also uses the group's count.
        """
        signature = inspect.signature(original)

        def process_mtp_loss(*args: Any, **kwargs: Any) -> Tensor:
            call = signature.bind(*args, **kwargs)
            call.apply_defaults()
            values = call.arguments
            group, config = values["cp_group"], values["config"]
            if group is None or group.size() == 1 or not _derive_labels(values):
                return original(*call.args, **call.kwargs)
            mask = values["loss_mask"]
            mask = torch.ones_like(values["labels"], dtype=torch.float32) if mask is None else mask.float()
            values |= {
                "loss_mask": mask,
                "config": _weighted(config, mask, group) if config.calculate_per_token_loss else config,
                "compute_language_model_loss": _times(group.size(), values["compute_language_model_loss"]),
            }
            self._group = group
            try:
                return original(*call.args, **call.kwargs)
            finally:
                self._group = None

        return process_mtp_loss


def _derive_labels(values: dict[str, Any]) -> bool:
    """Return whether there are labels. If there are only tokens (reinforcement learning), derive labels from tokens.

    Megatron derives labels inside the wrapped function, which is too late to read the mask of the main loss.
    """
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
    """Return a configuration that makes Megatron divide by the shifted count and multiply by the group's count."""
    weighted = copy.copy(config)
    weighted.calculate_per_token_loss = False
    weighted.mtp_loss_scaling_factor = config.mtp_loss_scaling_factor * sum_over_group(mask.sum(), group) / group.size()
    return weighted


def _times(factor: int, losses: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *args, **kwargs: losses(*args, **kwargs) * factor
