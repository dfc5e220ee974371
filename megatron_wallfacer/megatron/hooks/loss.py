"""Compute mean losses over the unmasked tokens of a context-parallel group.

Megatron divides a sum of token losses by the number of unmasked tokens of one rank, and averages gradients over
data-parallel and context-parallel ranks. If masks leave different numbers of tokens to the ranks of a context-parallel
group, the gradients differ from the gradients at context-parallel size 1, but the reported losses do not.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_wallfacer.megatron.hook import Hook, bound
from megatron_wallfacer.megatron.plugin_state import PluginState
from megatron_wallfacer.megatron.releases import FIRST_LAUNCHED

#: Loss function that a Megatron script returns with the model's output. Called with that output, it returns
#: (sum of token losses, number of unmasked tokens, report) or, in older scripts, (loss, report).
LossFunction = Callable[..., tuple[Any, ...]]


@partial(
    Hook,
    name="mean loss",
    purpose="takes mean losses over the unmasked tokens of the whole context-parallel group",
    target="megatron.core.pipeline_parallel.schedules:forward_step_calc_loss",
    since=FIRST_LAUNCHED,
    parameters=("loss_func", "config", "collect_non_loss_data"),
)
def loss_hook(state: PluginState, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Replace the script's loss function in ``forward_step_calc_loss``, which every pipeline schedule calls."""
    call = bound(original, *args, **kwargs)
    values = call.arguments
    if values["loss_func"] is not None and not values["collect_non_loss_data"]:
        values["loss_func"] = _corrected(values["loss_func"], values["config"], state)
    return original(*call.args, **call.kwargs)


def _corrected(loss_func: LossFunction, config: Any, state: PluginState) -> LossFunction:
    from megatron.core import parallel_state

    group = parallel_state.get_context_parallel_group()
    if group.size() == 1:
        return loss_func
    # With per-token loss Megatron itself sums token counts over all ranks once per step.
    if not config.calculate_per_token_loss:
        loss_func = mean_over_group(loss_func, group)
    if getattr(state.args, "sft", False) and not torch.is_grad_enabled():
        loss_func = report_of_group(loss_func, group)
    return loss_func


def mean_over_group(loss_func: LossFunction, group: dist.ProcessGroup) -> LossFunction:
    """Return a function that divides the loss of `loss_func` by the group's mean number of unmasked tokens per rank.

    On every rank the returned function gives 1 as the number of tokens. Every rank then counts equally in Megatron's
    average of losses, even if Megatron or the script adds up these numbers of tokens.

    Args:
        loss_func: loss function of a script. A result of two values is returned unchanged.
        group: context-parallel group. All ranks of the group must call the returned function for the same
            micro-batches.

    Returns:
        A function that returns (loss, 1, report). Averaged over the ranks of the group, the loss is the mean over all
        unmasked tokens of the group; 0 if there are none.
    """

    def mean_loss(*args: Any, **kwargs: Any) -> tuple[Any, ...]:
        outputs = loss_func(*args, **kwargs)
        if len(outputs) != 3:
            return outputs
        loss, count, report = outputs
        total = sum_over_group(torch.as_tensor(count, device=loss.device), group)
        return loss * (group.size() / total.clamp(min=1)), torch.ones_like(total), report

    return mean_loss


def report_of_group(loss_func: LossFunction, group: dist.ProcessGroup) -> LossFunction:
    """Return a loss function like ``loss_func`` that sums its report over a group.

    A report maps names to pairs (sum of token losses, number of tokens). In evaluation with ``--sft`` Megatron computes
    the mean loss of each rank's tokens, and averages the means over ranks. If losses and tokens are first summed over a
    group, all ranks of the group have the same mean.

    Args:
        loss_func: loss function of a script. Its last return value is the report.
        group: context-parallel group. All ranks of the group must call the returned function for the same
            micro-batches.
    """

    def reporting_loss(*args: Any, **kwargs: Any) -> tuple[Any, ...]:
        *values, report = loss_func(*args, **kwargs)
        summed = {
            name: sum_over_group(value, group) if isinstance(value, Tensor) and value.numel() == 2 else value
            for name, value in report.items()
        }
        return *values, summed

    return reporting_loss


def sum_over_group(value: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return the sum of a tensor over the ranks of a group, as a new tensor without gradient."""
    total = value.detach().clone()
    dist.all_reduce(total, group=group)
    return total
