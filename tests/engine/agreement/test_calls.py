"""The first calls of attention() are compared: ranks that disagree raise the same error, and none hangs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from megatron_wallfacer.attention import attention
from megatron_wallfacer.engine.agreement import calls
from megatron_wallfacer.engine.agreement.compare import Verdict
from megatron_wallfacer.errors import DisagreementError, OptionError
from megatron_wallfacer.schedule.schemes import make_plan
from tests.support.pool import Pool

PLAIN: dict[str, Any] = {"plan": make_plan("ring", 2), "kernel": "reference"}
DOCUMENTS = (0, 3, 16)


def call_once(rank: int, odd: int, changed: dict[str, Any], tokens: int) -> str:
    """The error of one call in which one rank has other arguments."""
    given = PLAIN | (changed if rank == odd else {})
    q = torch.ones(1, tokens if rank == odd else 8, 2, 8)
    try:
        attention(q, q, q, **given)
    except (DisagreementError, OptionError) as error:
        return str(error)
    return ""


def many_calls(rank: int, number: int) -> tuple[int, int]:
    """Exchanges that so many calls with one group make, and how many of the calls were made."""
    import torch.distributed as dist

    group, made = dist.new_group([0, 1]), 0
    exchanges = 0
    for _ in range(number):
        exchanges += calls.first_call(group) is not None
        made += 1
    return exchanges, made


@pytest.mark.parametrize("odd", [0, 1])
@pytest.mark.parametrize(
    ("changed", "tokens", "text"),
    [
        ({"plan": make_plan("ulysses", 2)}, 8, "plan"),
        ({"window_size": (3, 0)}, 8, "window_size"),
        ({"causal": False}, 8, "causal"),
        ({"cu_seqlens": DOCUMENTS}, 8, "cu_seqlens"),
        ({"scale": 0.5}, 8, " scale "),
        ({"softcap": 5.0}, 8, " softcap "),
        ({"keep_gathered_q": True}, 8, " keep_gathered_q "),
        ({}, 12, "shape of q"),
        ({}, 0, "shape of q"),
        ({"window_size": (-7, 0)}, 8, "rejects its arguments: window_size"),
        ({"kernel": "none"}, 8, "rejects its arguments: kernel"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_both_ranks_name_the_argument(
    pools: Callable[[int], Pool], odd: int, changed: dict[str, Any], tokens: int, text: str
) -> None:
    errors = pools(2).run(call_once, odd, changed, tokens)
    assert all(errors)
    assert text in errors[1 - odd]
    assert f"rank {odd} " in errors[1 - odd]
    assert "attention(), call " in errors[1 - odd]
    # The ranks still have their messages in order.
    assert pools(2).run(call_once, odd, {}, 8) == ["", ""]


def test_only_the_first_calls_of_a_group_are_compared(pools: Callable[[int], Pool]) -> None:
    assert pools(2).run(many_calls, 70) == [(calls.CALLS, 70)] * 2


def test_one_process_compares_nothing() -> None:
    assert calls.first_call(None) is None


def test_equal_arguments_agree() -> None:
    call = calls.FirstCall(None, 3)  # type: ignore[arg-type]
    assert call.verdict({0: {"a": "1"}, 5: {"a": "1"}}) == Verdict()
    assert call.verdict({0: {"a": "1"}, 5: {"a": "2"}}).errors == ("attention(), call 3: rank 5 has a 2, rank 0 has 1",)
