"""Build a text corpus from the sources of Python's standard library, without a download. Each byte is one token.

The demonstration and the tests train on the corpus. Python's standard library has about 10 MB of source. Megatron's own
writer stores the tokens as .bin and .idx files.

`tokenizer_arguments` returns flags for Megatron's `NullTokenizer`, which reads token ids. The command line of Megatron
(up to the main branch of 2026-08) does not accept the `ByteLevelTokenizer`; see `build_tokenizer`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from megatron_wallfacer.megatron.releases import VOCABULARY_WITH_END

EOD = 256
"""Token that ends a document. The tokens 0 to 255 are bytes."""

VOCABULARY = 257
"""Number of different tokens."""

_SEAL = "sha256.json"
"""File of a complete corpus that contains the digest of each other file."""

_SKIPPED = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})


def tokenizer_arguments(megatron: tuple[int, int]) -> list[str]:
    """Return the tokenizer flags with which a Megatron release (major, minor) reads this corpus."""
    # From 0.18 on, --vocab-size of the NullTokenizer includes the end-of-document token.
    size = VOCABULARY if megatron >= VOCABULARY_WITH_END else VOCABULARY - 1
    return ["--tokenizer-type", "NullTokenizer", "--vocab-size", str(size)]


def build_corpus(directory: Path, *, megabytes: float = 4) -> Path:
    """Write the corpus into a subfolder of `directory` unless a complete corpus exists there.

    Each source file becomes one document that ends with `EOD`. Each byte of source is a token. Files are added in the
    order of their paths until the corpus has at least `megabytes` * 1e6 tokens. Python's standard library has about
    10e6 bytes. Several processes may build a corpus at the same time. A killed process leaves a folder with a temporary
    name, not an incomplete corpus.

    Returns:
        The prefix for `--data-path`. The two files are `<prefix>.bin` and `<prefix>.idx`.

    Raises:
        ValueError: `megabytes` is not positive, or is larger than the source code of Python's standard library.
    """
    if megabytes <= 0:
        raise ValueError(f"megabytes must be positive, got {megabytes}")
    finished = directory / f"python-library-{megabytes:g}mb"
    prefix = finished / "bytes"
    if _is_whole(finished):
        return prefix
    directory.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=f".{finished.name}-", dir=directory))
    building.chmod(0o755)  # mkdtemp makes a folder that only its owner can read
    try:
        _write(building / prefix.name, int(megabytes * 1_000_000))
        (building / _SEAL).write_text(json.dumps(_digests(building)))
        _put(building, finished)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return prefix


def _put(building: Path, finished: Path) -> None:
    """Rename a corpus to its final name, replacing a damaged corpus."""
    with contextlib.suppress(OSError):
        os.rename(building, finished)
        return
    if _is_whole(finished):
        return  # another process has written the same corpus
    damaged = Path(tempfile.mkdtemp(prefix=f".{finished.name}-", dir=finished.parent))
    try:
        os.rename(finished, damaged / finished.name)
        os.rename(building, finished)
    finally:
        shutil.rmtree(damaged, ignore_errors=True)


def _is_whole(corpus: Path) -> bool:
    """Return whether a corpus is complete and unchanged. Megatron's index files in the same folder are ignored."""
    try:
        return json.loads((corpus / _SEAL).read_text()) == _digests(corpus)
    except (OSError, ValueError):
        return False


def _digests(corpus: Path) -> dict[str, str]:
    files = sorted(path for path in corpus.iterdir() if path.suffix in (".bin", ".idx"))
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def library_sources() -> Iterator[Path]:
    """Yield the .py files of the standard library in the order of paths, without tests and installed packages."""
    root = Path(os.__file__).parent
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = sorted(name for name in subfolders if name not in _SKIPPED)
        for name in sorted(files):
            if name.endswith(".py"):
                yield Path(folder, name)


def _write(prefix: Path, wanted: int) -> None:
    """Write sources as tokens into `<prefix>.bin` and `<prefix>.idx` until there are `wanted` tokens."""
    import numpy

    with warnings.catch_warnings():
        # Megatron's import warns that training kernels are missing, but writing a file needs no kernel.
        warnings.simplefilter("ignore")
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
        from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=numpy.uint16)
    tokens = 0
    # Rich prints the bar once at the end if stderr is a pipe.
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("tokenising Python's library", total=wanted)
        for source in library_sources():
            if tokens >= wanted:
                break
            document = numpy.frombuffer(source.read_bytes(), dtype=numpy.uint8).astype(numpy.uint16)
            document = numpy.append(document, numpy.uint16(EOD))
            builder.add_document(document, [document.size])
            tokens += document.size
            progress.update(task, completed=min(tokens, wanted))
    if tokens < wanted:
        raise ValueError(
            f"the corpus needs {wanted / 1e6:g} MB, Python's standard library has only {tokens / 1e6:.1f} MB of source"
        )
    builder.finalize(f"{prefix}.idx")
