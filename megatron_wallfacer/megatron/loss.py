"""Mean losses over the unmasked tokens of a context-parallel group.

Megatron divides a sum of token losses by the number of unmasked tokens of one rank, and averages gradients over
data-parallel and context-parallel ranks. Where masks leave unequal numbers of tokens to the ranks of a context-parallel
group, this is another mean than at context-parallel size 1: only gradients show it, reported losses do not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

#: What a Megatron script returns with the model's output: called with that output, it returns
#: (sum of token losses, number of unmasked tokens, report) or, the older form, (loss, report).
LossFunction = Callable[..., tuple[Any, ...]]


def mean_over_group(loss_func: LossFunction, group: dist.ProcessGroup) -> LossFunction:
    """Return `loss_func` with the mean over a group's unmasked tokens in place of a sum and a count.

    The count that is returned is 1 on every rank. So a Megatron that reduces counts over the context-parallel ranks by
    itself, or a script that has done so, changes nothing: equal counts on all ranks cancel.

    Args:
        loss_func: loss function of a script; two returned values are passed on unchanged.
        group: context-parallel group; each of its ranks must call the result for the same micro-batches.

    Returns:
        A function that returns (mean loss times group size, 1, report): averaged over the group's ranks, the first is
        the mean over the group's unmasked tokens. It is 0 where the group has none.
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
    """Return `loss_func` with each pair (sum of token losses, number of tokens) of its report summed over a group.

    For evaluation with ``--sft``: Megatron averages the quotients of the ranks, which are then equal in a group.

    Args:
        loss_func: loss function of a script; its report is the last value that it returns.
        group: context-parallel group; each of its ranks must call the result for the same micro-batches.
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
    """Return a tensor of numbers summed over the ranks of a group, as a new tensor without gradient."""
    total = value.detach().clone()
    dist.all_reduce(total, group=group)
    return total
