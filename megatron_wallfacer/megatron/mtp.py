"""Multi-token prediction over the tokens of a context-parallel group.

Megatron divides the losses of the extra layers by the number of unmasked tokens of one rank, with and without
``--calculate-per-token-loss`` (NVIDIA/Megatron-LM#7498). The numbers of a group's ranks differ even without a mask: the
last token of a sequence predicts nothing, and one rank has it. And it shifts packed tokens by the lengths of documents
without their padding (NVIDIA/Megatron-LM#4495), although tokens lie in memory with it.
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
    """Wrappers of two functions of Megatron: the loss of the extra layers, and the shift of tokens that it calls.

    The first makes the second count over the group: a shifted mask has other tokens on a rank than the mask, so the
    number is known only after the shift.
    """

    def __init__(self) -> None:
        # The group over which shifted masks are counted; None outside of the loss.
        self._group: dist.ProcessGroup | None = None

    def wrap_roll(self, original: Roll) -> Roll:
        """Return Megatron's ``roll_tensor`` with padded boundaries, and inside the loss with the group's counts.

        Args:
            original: called with a tensor ``[batch, tokens / P]`` and more, returns that tensor shifted and its sum.
        """
        signature = inspect.signature(original)

        def roll_tensor(*args: Any, **kwargs: Any) -> tuple[Tensor | None, Tensor | None]:
            call = signature.bind(*args, **kwargs)
            if call.arguments.get("packed_seq_params") is not None:
                call.arguments["packed_seq_params"] = as_laid_out(call.arguments["packed_seq_params"])
            rolled, total = original(*call.args, **call.kwargs)
            # Of what is shifted there, tokens and labels are integers, and their sums are not read.
            if self._group is None or total is None or not rolled.is_floating_point():
                return rolled, total
            return rolled, sum_over_group(total, self._group).clamp(min=1)

        return roll_tensor

    def wrap_loss(self, original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Return Megatron's ``process_mtp_loss`` with means over the tokens of the context-parallel group.

        Megatron averages over P ranks what is divided here by a count of all of them, so each loss is times P. With
        per-token loss Megatron weighs the mean by the number of tokens of the main loss: of the group too.
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
    """Whether there are labels; where tokens alone are given (reinforcement learning), labels are made of them.

    Megatron does the same inside, but there the mask of the main loss is known too late.
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
    """A configuration that has Megatron divide by the shifted count alone, and weigh by the group's unmasked tokens."""
    weighted = copy.copy(config)
    weighted.calculate_per_token_loss = False
    weighted.mtp_loss_scaling_factor = config.mtp_loss_scaling_factor * sum_over_group(mask.sum(), group) / group.size()
    return weighted


def _times(factor: int, losses: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A function of token losses, times a factor."""
    return lambda *args, **kwargs: losses(*args, **kwargs) * factor
