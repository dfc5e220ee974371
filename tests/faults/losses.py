"""Rows: losses and gradients that Megatron would compute otherwise."""

from __future__ import annotations

from tests.faults.row import NOTHING, Row

MASKED = "tests/megatron/test_masked.py"
NONE = "-"

ROWS: tuple[Row, ...] = (
    Row(
        "unequal numbers of unmasked tokens on context-parallel ranks, mean loss",
        "the mean is over the tokens of the group: gradients equal those of context-parallel size 1",
        NONE,
        NONE,
        NONE,
        "nothing",
        ("tests/megatron/test_loss.py", f"{MASKED}::test_few_unmasked_tokens[mean]"),
    ),
    Row(
        "the same with multi-token prediction, with and without `--calculate-per-token-loss`",
        "losses of extra layers, logged and trained, are over the tokens of the group",
        NONE,
        NONE,
        NONE,
        "nothing",
        (f"{MASKED}::test_few_unmasked_tokens[mean]", f"{MASKED}::test_few_unmasked_tokens[per token]"),
    ),
    Row(
        "documents whose padding is in `cu_seqlens_q_padded` alone, with multi-token prediction",
        "extra layers shift by padded lengths",
        NONE,
        NONE,
        NONE,
        "nothing",
        (f"{MASKED}::test_padded_documents",),
    ),
    Row(
        "evaluation with `--sft`",
        "the mean over sequences of their means, as at context-parallel size 1",
        NONE,
        NONE,
        NONE,
        "nothing",
        (f"{MASKED}::test_conversations",),
    ),
    Row(
        "a packed batch in another layout than zig-zag",
        "every rank ends with exit code 2",
        "at the first layer",
        "-",
        "`layer 1: cp_partition_mode contiguous: must be zigzag`",
        NOTHING,
        ("tests/megatron/test_packed.py::test_a_batch_that_is_not_supported_is_refused",),
    ),
    Row(
        "generation with a cache of keys and values",
        "every rank ends with exit code 2",
        "before the first token",
        "-",
        "`layer 1: --wallfacer-cp-size 2: must be left out to generate`",
        NOTHING,
        ("tests/megatron/test_fails_closed.py::test_a_cache_of_keys_and_values",),
    ),
)
