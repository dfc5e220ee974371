"""Trains like scripts/pretrain_gpt.py, but reads the conversations of --sft without the `datasets` package."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "pretrain_gpt.py"


class Conversations:
    """Stands in for Megatron's reader of a jsonl file."""

    def __init__(self, path: str) -> None:
        self._conversations = [json.loads(line)["messages"] for line in Path(path).read_text().splitlines()]

    def __len__(self) -> int:
        return len(self._conversations)

    def __getitem__(self, index: int) -> list:
        return self._conversations[index]


def read_conversations_alone() -> None:
    """From now on in this process."""
    from megatron.training.datasets import sft_dataset

    sft_dataset.SFTLowLevelDataset = Conversations


if __name__ == "__main__":
    read_conversations_alone()
    runpy.run_path(str(SCRIPT), run_name="__main__")
