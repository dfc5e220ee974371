"""The mean over a context-parallel group, through what Megatron does with a loss function's values."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist

from megatron_wallfacer.megatron.hooks.loss import LossFunction, mean_over_group, report_of_group
from tests.support.pool import Pool

RANKS, TOKENS = 4, 6
#: Unmasked tokens of each rank.
COUNTS = {"uneven": (6, 1, 0, 3), "fewer than ranks": (0, 0, 2, 0), "none": (0, 0, 0, 0), "equal": (3, 3, 3, 3)}


def loss_of(count: int, seen: torch.Tensor) -> LossFunction:
    """A script's loss function, whose first `count` tokens are unmasked."""

    def loss_func(output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        number = torch.tensor(count, dtype=torch.int)
        return output[:count].sum(), number, {"lm loss": seen}

    return loss_func


def reduced_by_script(loss_func: LossFunction) -> LossFunction:
    """A script that sums counts over the ranks by itself, and compensates the mean over ranks."""

    def reduced(output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        loss, number, report = loss_func(output)
        dist.all_reduce(number)
        return loss * dist.get_world_size(), number, report

    return reduced


def divide(values: tuple[torch.Tensor, torch.Tensor, object], reduces: bool) -> torch.Tensor:
    """What Megatron makes of the values; a later one (NVIDIA/Megatron-LM#7513) reduces counts."""
    loss, number, _ = values
    if reduces:
        number = number.clone()
        dist.all_reduce(number)
        loss = loss * dist.get_world_size()
    loss /= torch.clamp(number, min=1)
    return loss


def run_mean(rank: int, counts: tuple[int, ...], script_reduces: bool, megatron_reduces: bool) -> list[float]:
    """On a worker: gradients of this rank's token losses, averaged over ranks as DistributedDataParallel does."""
    output = torch.arange(TOKENS, dtype=torch.float64).add(rank).requires_grad_()
    loss_func = loss_of(counts[rank], torch.zeros(2))
    loss_func = reduced_by_script(loss_func) if script_reduces else loss_func
    divide(mean_over_group(loss_func, dist.group.WORLD)(output), megatron_reduces).backward()
    return (output.grad / RANKS).tolist()


@pytest.mark.parametrize("who", ["no one", "the script", "Megatron"])
@pytest.mark.parametrize("counts", COUNTS)
def test_gradients_are_those_of_the_mean_over_all_tokens(pools: Callable[[int], Pool], counts: str, who: str) -> None:
    """Also where counts are reduced elsewhere."""
    numbers = COUNTS[counts]
    for rank, gradient in enumerate(pools(RANKS).run(run_mean, numbers, who == "the script", who == "Megatron")):
        weight = 1 / max(1, sum(numbers))
        assert gradient == pytest.approx([weight] * numbers[rank] + [0] * (TOKENS - numbers[rank]))


def test_two_values_are_the_scripts_own() -> None:
    values = (torch.ones(1), {"lm loss": torch.ones(1)})
    assert mean_over_group(lambda: values, None)() is values


def run_report(rank: int) -> list[list[float]]:
    """On a worker: its report, of one pair and of one number."""
    report = {"lm loss": torch.tensor([float(rank), 1.0]), "other": torch.tensor([float(rank)])}
    *_, summed = report_of_group(lambda: (torch.ones(1), torch.ones(1), report), dist.group.WORLD)()
    assert report["lm loss"].tolist() == [rank, 1.0]
    return [value.tolist() for value in summed.values()]


def test_a_report_is_summed_where_it_is_a_sum_and_a_count(pools: Callable[[int], Pool]) -> None:
    for rank, values in enumerate(pools(RANKS).run(run_report)):
        assert values == [[6.0, 4.0], [float(rank)]]
