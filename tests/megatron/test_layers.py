"""N of N attention layers, or an error."""

import pytest
from torch import nn

from megatron_wallfacer.errors import WallfacerError
from megatron_wallfacer.megatron.core_attention import WallfacerCoreAttention
from megatron_wallfacer.megatron.layer_selection import mark_as_megatrons
from megatron_wallfacer.megatron.layers import LayerCount, advice_of_the_plugin, check_layers, count_layers


class Layer(nn.Module):
    """A transformer layer around a self-attention that may have a core attention."""

    def __init__(self, core: nn.Module | None) -> None:
        super().__init__()
        self.self_attention = nn.Module()
        if core is not None:
            self.self_attention.core_attention = core


class IdentityOp(nn.Module):
    """Megatron's name for a submodule that is left out."""


@pytest.fixture
def our_core() -> nn.Module:
    # Its own constructor needs Megatron's groups; only its class matters here.
    core = nn.Module.__new__(WallfacerCoreAttention)
    nn.Module.__init__(core)
    return core


def test_a_layer_with_our_core_attention_counts(our_core: nn.Module) -> None:
    assert count_layers([nn.ModuleList([Layer(our_core)])]) == LayerCount(1, 1, ())


def test_a_layer_with_another_core_attention_is_named(our_core: nn.Module) -> None:
    model = nn.ModuleList([Layer(our_core), Layer(nn.Dropout())])
    assert count_layers([model]) == LayerCount(1, 2, ("Dropout",))


def test_a_layer_with_megatrons_own_attention_is_printed_and_no_error(our_core: nn.Module) -> None:
    model = nn.ModuleList([Layer(our_core), Layer(mark_as_megatrons(nn.Dropout()))])
    count = count_layers([model])
    assert count == LayerCount(1, 2, (), ("Dropout",))
    line = "wallfacer: 1 of 2 attention layers; --wallfacer-layers leaves the others to Megatron's Dropout"
    assert check_layers([count], pipelines=1) == line


def test_a_model_with_only_megatrons_own_attention_is_an_error() -> None:
    with pytest.raises(WallfacerError, match="0 of 2"):
        check_layers([LayerCount(0, 2, (), ("Dropout",))], pipelines=1)


def test_an_attention_without_core_attention_is_named() -> None:
    layer = Layer(None)
    layer.self_attention = nn.GRU(1, 1)
    assert count_layers([layer]) == LayerCount(0, 1, ("GRU",))


def test_a_left_out_attention_does_not_count(our_core: nn.Module) -> None:
    layer = Layer(our_core)
    layer.cross_attention = IdentityOp()
    assert count_layers([layer]) == LayerCount(1, 1, ())


def test_stages_add_up_and_copies_count_once() -> None:
    two_stages_two_copies = [LayerCount(2, 2, ()), LayerCount(3, 3, ())] * 2
    assert check_layers(two_stages_two_copies, pipelines=2) == "wallfacer: 5 of 5 attention layers"


def test_n_of_m_is_an_error_that_names_the_others() -> None:
    with pytest.raises(WallfacerError, match="3 of 4 attention layers, but not DotProductAttention"):
        check_layers([LayerCount(2, 2, ()), LayerCount(1, 2, ("DotProductAttention",))], pipelines=1)


def test_a_foreign_layer_on_one_rank_of_many_is_enough() -> None:
    with pytest.raises(WallfacerError, match="GRU"):
        check_layers([LayerCount(2, 3, ("GRU",)), *[LayerCount(2, 2, ())] * 3], pipelines=4)


def test_no_attention_layer_at_all_is_an_error() -> None:
    with pytest.raises(WallfacerError, match="0 of 0"):
        check_layers([LayerCount(0, 0, ())], pipelines=1)


@pytest.mark.parametrize("advice", ["only by TEDotProductAttention!", "only with TE DotProductAttention."])
def test_megatrons_advice_to_use_its_attention_is_replaced(advice: str) -> None:
    """Of core attention, and of multimodal models."""
    with pytest.raises(WallfacerError, match="--wallfacer-cp-size: must be left out, because"), advice_of_the_plugin():
        raise AssertionError(advice)


def test_other_assertions_of_megatron_are_its_own() -> None:
    with pytest.raises(AssertionError, match="hidden size"), advice_of_the_plugin():
        raise AssertionError("hidden size")
