"""The longest sequence: it fits, a longer one does not, and its memory is named."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_wallfacer.planning.cluster_file import load_cluster
from megatron_wallfacer.planning.configuration import Request, fits_memory
from megatron_wallfacer.planning.configurations import search_configurations
from megatron_wallfacer.planning.longest import UNITS, _most_tokens, longest_sequences, unit_of
from megatron_wallfacer.planning.model import MODELS

NODE = load_cluster("h100-8x8", 1)
REQUEST = Request(MODELS["llama3-8b"], NODE, 1, tp=4, optimizers="all")


def test_an_8b_model_on_one_node() -> None:
    plain, other = longest_sequences(REQUEST)
    for one, only_plain in ((plain, True), (other, False)):
        tokens = one.configuration.request.tokens
        assert one.configuration.fits
        assert one.configuration.has_plain_optimizer == only_plain
        assert not fits_memory(one.longer.step, NODE)
        request = replace(REQUEST, tokens=tokens + one.unit, optimizers="plain" if only_plain else "all")
        assert search_configurations(request).best == ()
    assert plain.configuration.request.tokens >= 2_000_000
    assert other.configuration.request.tokens > plain.configuration.request.tokens
    assert other.configuration.options.adam == "host"


def test_only_tested_optimizers_are_considered_unless_others_are_requested() -> None:
    for one in longest_sequences(replace(REQUEST, optimizers="tested")):
        assert one.configuration.options.adam == "device"


def test_host_memory_may_stop_it() -> None:
    small = replace(NODE, host_memory_gb=100.0)
    (found, *_) = longest_sequences(replace(REQUEST, cluster=small))
    assert found.longer.step.host_gb <= 100
    assert 0 < found.longer.options.inputs_on_host < 1


def test_a_model_whose_states_do_not_fit_has_none() -> None:
    assert (
        longest_sequences(replace(REQUEST, model=MODELS["llama3-70b"], cluster=NODE.with_gpus_per_node(1), tp=1)) == []
    )


@pytest.mark.parametrize(("tokens", "ranks", "unit"), [(0, 8, 8192), (1 << 20, 8, 65536), (0, 1 << 14, 1 << 15)])
def test_every_rank_holds_two_chunks(tokens: int, ranks: int, unit: int) -> None:
    assert unit_of(tokens, ranks) == unit


@pytest.mark.parametrize("start", [0, 1 << 19, (1 << 20) - 8192, (1 << 20) + 8192, 3 << 20])
def test_the_longest_is_found_from_any_length(start: int) -> None:
    """Also where the first length is no multiple of the larger unit."""
    for most in range(start + 8192, start + (1 << 21), 70001):
        found = _most_tokens(lambda tokens, most=most: tokens <= most, start, 8)
        assert found == 0 or found <= most < found + UNITS[1] + UNITS[0]
