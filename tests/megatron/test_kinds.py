"""Kinds of attention, trained by Megatron over several ranks and on one.

On one rank it is Megatron's own attention that trains, except where it cannot on a CPU (latent attention, documents cut
one by one): there it is the plugin's with the reference kernel, which the module tests compare with the formula.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.megatron.test_checkouts import CHECKOUTS
from tests.megatron.training import GRAD_NORM_TOLERANCE, LOSS_TOLERANCE, arguments, largest_differences
from tests.support.megatron_runs import RunResult, train
from tests.support.short_documents import write_conversations, write_documents

ITERATIONS = 3
SUPPORT = Path(__file__).resolve().parents[1] / "support"
CONVERSATIONS = SUPPORT / "conversations_training.py"
ALONE = ("--wallfacer-cp-size", "1", "--wallfacer-kernel", "reference")

#: Beside flags of the model: ranks, and how they work together. A chunk has 32 tokens on 4 ranks, 64 on 2.
KINDS = {
    "--window-size 10,0": (4, "--wallfacer-scheme ring"),
    "--window-size 100,0 --window-attn-skip-freq 2 --num-layers 3": (
        4,
        "--wallfacer-team-size 2 --wallfacer-window-scheme ulysses --num-query-groups 4",
    ),
    "--softmax-type learnable --qk-layernorm": (2, "--wallfacer-team-size 2"),
    "--softmax-type off-by-one --window-size 70,0": (2, "--wallfacer-scheme ulysses"),
}
#: Large weights, with which attention weighs more in the loss.
LARGE = ("--init-method-std", "0.2")
LATENT = (
    "--multi-latent-attention --kv-lora-rank 16 --q-lora-rank 24 --qk-head-dim 16 --qk-pos-emb-head-dim 8 "
    "--v-head-dim 12"
).split()


def check_equal(run: RunResult, reference: RunResult) -> None:
    assert len(run.check().iterations) == len(reference.check().iterations) == ITERATIONS
    loss, grad_norm = largest_differences(run, reference)
    assert loss <= LOSS_TOLERANCE
    assert grad_norm <= GRAD_NORM_TOLERANCE


def check_differs(run: RunResult, reference: RunResult) -> None:
    """A negative control: far outside what parity allows."""
    assert len(run.check().iterations) == len(reference.check().iterations) == ITERATIONS
    assert largest_differences(run, reference)[0] > 100 * LOSS_TOLERANCE


def flags_of(kind: str, *flags: str) -> list[str]:
    return arguments(*kind.split(), *flags, iterations=ITERATIONS)


@pytest.mark.parametrize("kind", KINDS)
def test_kind(kind: str) -> None:
    ranks, split = KINDS[kind]
    groups = "--num-query-groups 4".split() if "--num-query-groups" in split else []
    run = train(ranks, flags_of(kind, "--wallfacer-cp-size", str(ranks), *split.split()))
    check_equal(run, train(1, flags_of(kind, *groups)))


def test_sinks_go_through_a_checkpoint_to_megatrons_attention_and_back(tmp_path: Path) -> None:
    flags = "--softmax-type learnable --ckpt-format torch_dist --save-interval 2".split()
    whole = train(1, flags_of("", *flags, "--save", str(tmp_path / "whole"))).check()
    for name, saving, loading in (("ours", 2, 1), ("theirs", 1, 2)):
        folder, split = str(tmp_path / name), ("--wallfacer-cp-size", "2")
        first = flags_of("", *flags, "--save", folder, "--exit-interval", "2", *split[: 2 * (saving == 2)])
        train(saving, first).check()
        run = train(loading, flags_of("", *flags, "--load", folder, *split[: 2 * (loading == 2)])).check()
        assert run.losses == pytest.approx(whole.losses[2:], rel=LOSS_TOLERANCE)


def latent(*flags: str) -> list[str]:
    given = flags_of("", *LATENT, *LARGE, *flags)
    # Latent attention has no groups of query heads.
    given.remove("--group-query-attention")
    at = given.index("--num-query-groups")
    return given[:at] + given[at + 2 :]


def test_latent_attention() -> None:
    check_equal(train(2, latent("--wallfacer-cp-size", "2")), train(1, latent(*ALONE)))


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_documents(tmp_path_factory.mktemp("documents"))


def packing(documents: Path, *flags: str) -> list[str]:
    """Documents packed and masked, the sequence cut as a whole."""
    return flags_of("--dataloader-inter-document-masking", "--data-path", str(documents), *LARGE, *flags)


def masking(documents: Path, *flags: str) -> list[str]:
    """The same documents in Megatron's other way: a mask as a tensor, which only its own attention reads."""
    return flags_of("--reset-attention-mask --reset-position-ids", "--data-path", str(documents), *LARGE, *flags)


@pytest.mark.parametrize(
    ("ranks", "flags"),
    [(4, "--wallfacer-team-size 2"), (2, "--wallfacer-scheme ring --micro-batch-size 2")],
)
def test_documents_in_a_sequence_that_is_cut(documents: Path, ranks: int, flags: str) -> None:
    run = train(ranks, packing(documents, "--wallfacer-cp-size", str(ranks), *flags.split()))
    check_equal(run, train(1, masking(documents, *flags.split()[2:])))
    assert "rope of packed sequences" in run.output


def test_latent_attention_in_documents(documents: Path) -> None:
    flags = ("--dataloader-inter-document-masking", "--data-path", str(documents))
    run = train(2, latent(*flags, "--wallfacer-cp-size", "2"))
    check_equal(run, train(1, latent(*flags, *ALONE)))


def test_conversations_that_are_cut_one_by_one(tmp_path: Path) -> None:
    """With everything else at once: windows in some layers, sinks, a team."""
    data, tokenizer = write_conversations(tmp_path, multiple=16)
    flags = [
        *("--sft --sft-tokenizer-prompt-format default --no-create-attention-mask-in-dataloader".split()),
        # Megatron's mean over a micro-batch is one over each rank's tokens, of which some ranks mask more than others.
        *("--calculate-per-token-loss --split 100,0,0 --data-path".split()),
        str(data),
        *("--tokenizer-type", "SFTTokenizer", "--tokenizer-model", str(tokenizer)),
        *("--window-size 20,0 --window-attn-skip-freq 2 --softmax-type learnable --num-layers 3".split()),
    ]
    run = train(4, flags_of("", *flags, "--wallfacer-cp-size", "4", "--wallfacer-team-size", "2"), script=CONVERSATIONS)
    check_equal(run, train(1, flags_of("", *flags, *ALONE), script=CONVERSATIONS))


@pytest.mark.skipif(not CHECKOUTS, reason="MEGATRON_PATHS names no Megatron-LM checkout")
@pytest.mark.parametrize("checkout", CHECKOUTS, ids=str)
def test_documents_in_an_unmodified_checkout(documents: Path, checkout: Path) -> None:
    script = checkout / "pretrain_gpt.py"
    if "dataloader_inter_document_masking" not in script.read_text():
        pytest.skip("this Megatron packs no documents but with --sft")
    run = train(2, packing(documents, "--wallfacer-cp-size", "2"), script=script)
    check_equal(run, train(1, masking(documents), script=script))


# --- negative controls: what is broken on purpose is seen by the same comparison ---


def test_shifted_documents_are_seen(documents: Path) -> None:
    run = train(2, packing(documents, "--wallfacer-cp-size", "2"), script=SUPPORT / "shifted_documents.py")
    check_differs(run, train(1, masking(documents)))


def test_a_window_of_one_key_too_many_is_seen() -> None:
    window = flags_of("--window-size 3,0", *LARGE)
    run = train(2, [*window, "--wallfacer-cp-size", "2"], script=SUPPORT / "wrong_window.py")
    check_differs(run, train(1, window))


def test_a_gradient_that_is_not_reduced_is_seen() -> None:
    run = train(2, flags_of("", "--wallfacer-cp-size", "2"), script=SUPPORT / "dropped_reduction.py")
    check_differs(run, train(1, flags_of("")))
