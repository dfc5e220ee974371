"""``auto`` tiles: chosen from the command line alone, the fewest that take a buffer off the peak."""

from __future__ import annotations

import pytest

from megatron_wallfacer.errors import WallfacerError
from megatron_wallfacer.megatron.auto_tiles import ChosenTiles, choose_tiles
from megatron_wallfacer.megatron.settings import settings_from
from megatron_wallfacer.planning.inventory import inventory, peak
from tests.megatron.test_arguments import Parse, parse  # noqa: F401

#: Llama 3 8B at 1M tokens on 8 ranks.
MODEL = (
    "--num-layers 32 --hidden-size 4096 --ffn-hidden-size 14336 --swiglu --num-attention-heads 32 "
    "--group-query-attention --num-query-groups 8 --vocab-size 128256 --seq-length 1048576 "
    "--max-position-embeddings 1048576 --micro-batch-size 1 --bf16 --wallfacer-cp-size 8 "
    "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
)


def chosen(parse: Parse, flags: str, model: str = MODEL) -> tuple[int | None, int | None, ChosenTiles | None]:  # noqa: F811
    args = parse(*model.split(), *flags.split(), world=8).args
    settings, found = choose_tiles(settings_from(args), args)
    return settings.flags.loss_tiles, settings.flags.mlp_tiles, found


def test_both_take_their_buffers_off_the_peak(parse: Parse) -> None:  # noqa: F811
    loss, mlp, found = chosen(parse, "--wallfacer-loss-tiles auto --wallfacer-mlp-tiles auto")
    assert found is not None
    assert loss > 1
    assert mlp > 1
    before, after = peak(inventory(found.before)), peak(inventory(found.after))
    assert before[0] == "head"
    assert after[0] not in ("head", "mlp")
    assert after[1] < 0.6 * before[1]
    assert f"The number of tiles is {loss} for head and loss, and {mlp} for each MLP." in found.text()
    assert f"{after[1] / 1e9:.2f} GB per rank instead of {before[1] / 1e9:.2f} GB with one tile." in found.text()


def test_a_number_beside_it_is_kept(parse: Parse) -> None:  # noqa: F811
    loss, mlp, _ = chosen(parse, "--wallfacer-loss-tiles 128 --wallfacer-mlp-tiles auto")
    assert (loss, mlp) == (128, chosen(parse, "--wallfacer-loss-tiles 64 --wallfacer-mlp-tiles auto")[1])
    assert chosen(parse, "--wallfacer-loss-tiles 4") == (4, None, None)


def test_a_short_sequence_needs_none(parse: Parse) -> None:  # noqa: F811
    short = MODEL.replace("1048576", "8192")
    loss, mlp, found = chosen(parse, "--wallfacer-loss-tiles auto --wallfacer-mlp-tiles auto", short)
    assert (loss, mlp) == (None, None)
    assert found is not None


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (MODEL.replace("--vocab-size 128256", ""), "needs --vocab-size on the command line, or a number here"),
        (f"{MODEL} --num-experts 8", "must be a number, because auto does not support experts or latent attention"),
    ],
)
def test_what_auto_cannot_know_is_an_error(parse: Parse, model: str, message: str) -> None:  # noqa: F811
    with pytest.raises(WallfacerError, match=f"--wallfacer-loss-tiles auto: {message}"):
        chosen(parse, "--wallfacer-loss-tiles auto", model)
