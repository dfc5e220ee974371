"""Data for packed sequences: documents much shorter than a chunk beside documents that span many ranks."""

from __future__ import annotations

import json
import random
import warnings
from collections.abc import Iterator
from pathlib import Path

from megatron_wallfacer.training_runs.corpus import EOD

#: Characters of the conversations, one token each.
LETTERS = "abcdefghijklmnopqrstuvwxyz .\n"


def lengths(seed: int) -> Iterator[int]:
    """Without end: of one token, of a few, of a hundred, of several sequences."""
    dice = random.Random(seed)
    while True:
        yield dice.choice([1, dice.randint(2, 20), dice.randint(2, 20), dice.randint(30, 150), dice.randint(300, 700)])


def write_documents(folder: Path, tokens: int = 40_000) -> Path:
    """Text of few letters in Megatron's .bin/.idx format, each document ended by `EOD`; the prefix of the two files."""
    import numpy

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    prefix, dice, written = folder / "short", random.Random(1), 0
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=numpy.uint16)
    for length in lengths(seed=2):
        if written >= tokens:
            break
        document = [*_words(dice, length - 1), EOD]
        builder.add_document(numpy.array(document, dtype=numpy.uint16), [length])
        written += length
    builder.finalize(f"{prefix}.idx")
    return prefix


def write_conversations(folder: Path, multiple: int, count: int = 60) -> tuple[Path, Path]:
    """A jsonl file for --sft and the tokenizer for it.

    Megatron pads documents to 2P tokens with context parallelism and does not without it. All documents here are
    multiples of ``multiple`` tokens, so that the batches are the same.

    Returns:
        The file, and the tokenizer's folder.
    """
    dice, data = random.Random(3), folder / "conversations.jsonl"
    with data.open("w") as file:
        for _ in range(count):
            messages = []
            for length in (dice.choice([1, 1, 2, 3, 9]) * multiple for _ in range(12)):
                # The template below puts one token before each message and one after the last.
                text = "".join(map(chr, _words(dice, length - 3)))
                messages += [{"role": "system", "content": ""}, {"role": "user", "content": text}]
            file.write(json.dumps({"messages": messages}) + "\n")
    return data, _write_tokenizer(folder / "tokenizer")


def _words(dice: random.Random, count: int) -> list[int]:
    """Letters that can be learnt from: each is likely to be followed by the next one of the alphabet."""
    letters, at = [], 0
    for _ in range(count):
        at = (at + dice.choice([1, 1, 1, 7])) % len(LETTERS)
        letters.append(ord(LETTERS[at]))
    return letters


def _write_tokenizer(folder: Path) -> Path:
    """One token a character, and a chat template."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    specials = ["<pad>", "<unk>", "<eos>", "<turn>"]
    vocabulary = {token: number for number, token in enumerate([*specials, *LETTERS])}
    characters = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    characters.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=characters,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="<eos>",
        additional_special_tokens=["<turn>"],
        chat_template="{% for m in messages %}<turn>{{ m['content'] }}{% endfor %}<eos>",
    )
    tokenizer.save_pretrained(folder)
    return folder
