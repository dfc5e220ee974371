"""Unmasked tokens that are unequal on the ranks: gradients and losses are those of context-parallel size 1."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from tests.megatron.training import GRAD_NORM_TOLERANCE, LOSS_TOLERANCE, arguments, largest_differences
from tests.support.masked_training import BATCHES, DOCUMENTS, GRADIENTS, PADDED
from tests.support.megatron_runs import RunResult, train
from tests.support.short_documents import write_conversations

SCRIPT = Path(__file__).resolve().parents[1] / "support" / "masked_training.py"
ITERATIONS = 3
SMALL = "--seq-length 64 --max-position-embeddings 64 --hidden-size 32 --ffn-hidden-size 64".split()
ALONE = ("--wallfacer-cp-size", "1", "--wallfacer-kernel", "reference")
MTP, PER_TOKEN = ("--mtp-num-layers", "2"), ("--calculate-per-token-loss",)


@dataclass(frozen=True)
class Trained:
    """One training.

    Attributes:
        run: losses and gradient norms.
        gradients: of each rank, the reduced gradients of the first step, by parameter.
    """

    run: RunResult
    gradients: list[dict[str, torch.Tensor]]

    @property
    def mtp_losses(self) -> list[float]:
        """Of all extra layers and iterations, as printed: seven digits."""
        return [float(text) for text in re.findall(r"mtp_\d+ loss: (\S+)", self.run.ranks[-1].output)]

    @property
    def evaluated(self) -> list[float]:
        """Losses of evaluation, as printed."""
        return [float(text) for text in re.findall(r"validation loss at .*?lm loss value: (\S+)", self.run.output)]


Train = Callable[..., Trained]


@pytest.fixture
def trained(tmp_path: Path) -> Train:
    def run(ranks: int, *flags: str, batches: str = "") -> Trained:
        folder = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        given = arguments(*SMALL, *flags, iterations=ITERATIONS)
        result = train(ranks, given, script=SCRIPT, env={GRADIENTS: str(folder), BATCHES: batches}).check()
        return Trained(result, [torch.load(folder / f"{rank}.pt") for rank in range(ranks)])

    return run


def check_equal(one: Trained, whole: Trained, stages: int = 1) -> None:
    """Losses, gradient norms, and each parameter's first gradient on every rank."""
    assert len(one.run.iterations) == len(whole.run.iterations) == ITERATIONS
    loss, grad_norm = largest_differences(one.run, whole.run)
    assert loss <= LOSS_TOLERANCE
    assert grad_norm <= GRAD_NORM_TOLERANCE
    assert one.mtp_losses == pytest.approx(whole.mtp_losses, rel=LOSS_TOLERANCE)
    assert one.evaluated == pytest.approx(whole.evaluated, rel=LOSS_TOLERANCE)
    ranks = len(one.gradients) // stages
    for rank, gradients in enumerate(one.gradients):
        wanted = whole.gradients[rank // ranks]
        assert gradients.keys() == wanted.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(
                gradient, wanted[name], rtol=0, atol=GRAD_NORM_TOLERANCE * wanted[name].abs().max().item(), msg=name
            )


@pytest.mark.parametrize("loss", [(), PER_TOKEN], ids=["mean", "per token"])
def test_few_unmasked_tokens(trained: Train, loss: tuple[str, ...]) -> None:
    """Fewer than ranks, and ranks with none; losses of extra layers too."""
    whole = trained(1, *MTP, *loss, batches="few")
    assert len(whole.mtp_losses) == 2 * ITERATIONS
    for ranks, size in ((4, 4), (4, 2)):  # the second is twice data-parallel
        check_equal(trained(ranks, *MTP, *loss, "--wallfacer-cp-size", str(size), batches="few"), whole)


def test_few_unmasked_tokens_in_a_pipeline(trained: Train) -> None:
    stages = "--num-layers 4 --pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1".split()
    whole = trained(2, *stages, batches="few")
    check_equal(trained(4, *stages, "--wallfacer-cp-size", "2", batches="few"), whole, stages=2)


@pytest.mark.parametrize("loss", [(), PER_TOKEN], ids=["mean", "per token"])
def test_conversations(trained: Train, loss: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> None:
    """Prompts are masked. Evaluation is the mean over conversations of their means."""
    data, tokenizer = write_conversations(tmp_path_factory.mktemp("conversations"), multiple=16)
    flags = (
        *"--sft --sft-tokenizer-prompt-format default --no-create-attention-mask-in-dataloader --split 50,50,0".split(),
        *("--data-path", str(data), "--tokenizer-type", "SFTTokenizer", "--tokenizer-model", str(tokenizer)),
        *("--seq-length", "128", "--max-position-embeddings", "128", "--eval-interval", "2", "--eval-iters", "1"),
        *MTP,
        *loss,
    )
    whole = trained(1, *flags, *ALONE)
    assert whole.evaluated
    for ranks, size in ((4, 4), (2, 2), (4, 2)):  # the last is twice data-parallel
        check_equal(trained(ranks, *flags, "--wallfacer-cp-size", str(size)), whole)


def test_padded_documents(trained: Train) -> None:
    """Boundaries without padding differ from those in memory: extra layers shift by the latter."""
    lengths = [("--seq-length", str(ends[-1]), "--max-position-embeddings", "64") for ends in (DOCUMENTS, PADDED)]
    whole = trained(1, *MTP, *lengths[0], *ALONE, batches="padded")
    check_equal(trained(2, *MTP, *lengths[1], "--wallfacer-cp-size", "2", batches="padded"), whole)
