"""What the combinations are trained on, and the tokenizer for it."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from functools import cache
from pathlib import Path

from megatron_wallfacer.megatron.version import megatron_version
from megatron_wallfacer.training_runs.corpus import tokenizer_arguments
from tests.megatron.training import corpus
from tests.support.short_documents import write_conversations, write_documents

#: Conversations of so many tokens, or twice as many...: on any number of ranks here Megatron pads none of them.
MULTIPLE = 32


@cache
def data_flags(documents: str) -> tuple[str, ...]:
    """Megatron's flags for a level of the factor ``documents``; writes the data once in a process."""
    if documents == "conversations":
        lines, tokenizer = write_conversations(_folder(), MULTIPLE)
        return ("--data-path", str(lines), "--tokenizer-type", "SFTTokenizer", "--tokenizer-model", str(tokenizer))
    path = corpus() if documents == "one" else write_documents(_folder())
    return ("--data-path", str(path), *tokenizer_arguments(megatron_version()[:2]))


def _folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="composition-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder
