"""Trains like scripts/pretrain_gpt.py, but attention takes every document to end one token later."""

import runpy

from megatron_wallfacer.megatron.packed import Documents
from tests.support.conversations_training import SCRIPT

right = Documents._read


def shifted(self: Documents, *args: object) -> tuple[int, ...]:
    documents = right(self, *args)
    moved = [end + 1 for end in documents[1:-1] if end + 1 < documents[-1]]
    return tuple(dict.fromkeys((0, *moved, documents[-1])))


Documents._read = shifted
runpy.run_path(str(SCRIPT), run_name="__main__")
