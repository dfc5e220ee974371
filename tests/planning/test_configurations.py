"""The search over sizes, flags and grids: the target, what stays fixed, and that nothing better is left out."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest

from megatron_wallfacer.errors import OptionError
from megatron_wallfacer.planning import configurations as module
from megatron_wallfacer.planning.cluster_file import load_cluster
from megatron_wallfacer.planning.configuration import Request, fits_memory, not_dominated, ranked
from megatron_wallfacer.planning.configurations import PlanResult, search_configurations
from megatron_wallfacer.planning.model import MODELS
from megatron_wallfacer.planning.search import TIE

NODE = load_cluster("h100-8x8", 1)
TARGET = Request(MODELS["llama3-8b"], NODE, 1 << 20)


@cache
def result(request: Request) -> PlanResult:
    return search_configurations(request)


def test_an_8b_model_at_1m_tokens_on_one_node() -> None:
    """At least two configurations that tests cover fit 80 GB and the host at 40 % MFU of unmasked pairs."""
    good = [one for one in result(TARGET).best if one.has_plain_optimizer and one.step.mfu >= 0.4]
    assert len(good) >= 2
    for one in good:
        assert one.step.memory_gb <= NODE.device.memory_gb
        assert one.step.host_gb <= NODE.host_memory_gb
        assert one.options.loss_tiles > 1  # logits are 101 GB per rank


def test_untested_optimizers_are_searched_only_on_request() -> None:
    assert {one.options.adam for one in result(TARGET).best} == {"device"}
    assert "host" in {one.options.adam for one in result(replace(TARGET, optimizers="all")).best}


def test_attention_run_again_takes_longer_than_attention_kept() -> None:
    best = result(TARGET).best
    kept, full = (
        min(one.step.seconds for one in best if one.options.recompute == how and one.has_plain_optimizer)
        for how in ("keep-attention", "full")
    )
    assert 1.15 < full / kept < 1.35


def test_given_sizes_stay() -> None:
    found = result(replace(TARGET, tp=2, cp=4)).best
    assert {(one.sizes.tp, one.sizes.cp) for one in found} == {(2, 4)}
    assert {one.choice.plan.grid.cp_size for one in found} == {4}


def test_rows_are_in_order_and_none_beats_another() -> None:
    first, *others = result(TARGET).best
    assert others == sorted(others, key=lambda one: (not one.has_plain_optimizer, one.step.seconds))
    assert first.step.seconds <= TIE * others[0].step.seconds
    assert set(not_dominated(others)) == set(others)
    assert all(fits_memory(one.step, NODE) for one in (first, *others))


def test_of_equals_the_one_with_free_memory_is_taken() -> None:
    found = list(result(TARGET).best)
    equal = [
        one for one in found if one.has_plain_optimizer and one.step.seconds <= TIE * min(x.step.seconds for x in found)
    ]
    assert any(one.step.memory_gb > 72 for one in equal)
    assert ranked(found)[0].step.memory_gb <= 72


def test_no_other_combination_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    """With every grid in every number of head groups tried for every combination."""
    request = replace(TARGET, tokens=1 << 19, tp=1)
    quick = min(one.step.seconds for one in search_configurations(request).best)
    monkeypatch.setattr(module, "TIE", 1e9)
    monkeypatch.setattr(module, "REGROUPED", 100)
    assert quick <= 1.02 * min(one.step.seconds for one in search_configurations(request).best)


def test_nothing_fits() -> None:
    found = result(replace(TARGET, tokens=1 << 25, tp=1))
    assert found.best == ()
    assert found.leanest.step.memory_gb > NODE.device.memory_gb
    assert found.leanest.options.recompute == "full"


def test_a_cluster_without_host_memory_keeps_nothing_there() -> None:
    found = result(replace(TARGET, tp=4, cluster=replace(NODE, host_link=None)))
    assert found.best
    assert all(one.step.host_gb == 0 for one in found.best)


def test_less_memory_leaves_fewer_configurations() -> None:
    small = replace(NODE, device=replace(NODE.device, memory_gb=62))
    found = result(replace(TARGET, tp=4, cluster=small)).best
    assert found
    assert all(one.step.memory_gb <= 62 for one in found)


def test_sizes_that_do_not_divide() -> None:
    with pytest.raises(OptionError, match="tp=3: must be a divisor of the 8 devices of a node"):
        search_configurations(replace(TARGET, tp=3))
    with pytest.raises(OptionError, match="seq=1000: must be a multiple of 16"):
        search_configurations(replace(TARGET, tokens=1000, cp=8, tp=1))
