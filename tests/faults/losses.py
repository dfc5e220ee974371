"""Rows: losses and gradients that Megatron would compute otherwise."""

from __future__ import annotations

from tests.faults.row import NOTHING, Row

MASKED = "tests/megatron/test_masked.py"
NONE = "-"

ROWS: tuple[Row, ...] = (
    Row(
        "context-parallel ranks have unequal numbers of unmasked tokens, and the loss is a mean",
        "the loss is the mean over the tokens of the whole context-parallel group, so gradients equal those of size 1",
        NONE,
        NONE,
        NONE,
        "nothing",
        ("tests/megatron/test_loss.py", f"{MASKED}::test_few_unmasked_tokens[mean]"),
    ),
    Row(
        "context-parallel ranks have unequal numbers of unmasked tokens in the layers of multi-token prediction",
        "logged and trained losses of these layers are means over the tokens of the whole context-parallel group",
        NONE,
        NONE,
        NONE,
        "nothing",
        (f"{MASKED}::test_few_unmasked_tokens[mean]", f"{MASKED}::test_few_unmasked_tokens[per token]"),
    ),
    Row(
        "documents of multi-token prediction have padding that only `cu_seqlens_q_padded` counts",
        "the layers of multi-token prediction shift tokens within padded lengths",
        NONE,
        NONE,
        NONE,
        "nothing",
        (f"{MASKED}::test_padded_documents",),
    ),
    Row(
        "a job evaluates with `--sft`",
        "the evaluation loss is the mean over sequences of their mean losses, as at context-parallel size 1",
        NONE,
        NONE,
        NONE,
        "nothing",
        (f"{MASKED}::test_conversations",),
    ),
    Row(
        "a packed batch has another layout than zig-zag",
        "every rank ends with exit code 2",
        "at the first layer",
        "-",
        "`layer 1: cp_partition_mode contiguous: must be zigzag`",
        NOTHING,
        ("tests/megatron/test_packed.py::test_a_batch_that_is_not_supported_is_rejected",),
    ),
    Row(
        "a script generates text with a cache of keys and values",
        "every rank ends with exit code 2",
        "before the first token",
        "-",
        "`layer 1: --wallfacer-cp-size 2: must be left out to generate`",
        NOTHING,
        ("tests/megatron/test_fails_closed.py::test_a_cache_of_keys_and_values",),
    ),
)
