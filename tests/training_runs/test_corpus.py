"""The demonstration's corpus is used again only as it was written."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_wallfacer.training_runs import corpus


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Folders that a corpus was written to; the files are made up."""
    folders: list[Path] = []

    def write(prefix: Path, wanted: int) -> None:
        folders.append(prefix.parent)
        for suffix in (".bin", ".idx"):
            prefix.with_suffix(suffix).write_bytes(b"tokens" * wanted)

    monkeypatch.setattr(corpus, "_write", write)
    return folders


def test_a_corpus_is_written_once(tmp_path: Path, written: list[Path]) -> None:
    first = corpus.build_corpus(tmp_path, megabytes=0.001)
    (first / "cache" / "GPTDataset_indices").mkdir(parents=True)  # as Megatron does at the first use
    assert corpus.build_corpus(tmp_path, megabytes=0.001) == first
    assert len(written) == 1


@pytest.mark.parametrize("damage", ["shorter", "changed", "missing", "unsealed"])
def test_a_damaged_corpus_is_written_again(tmp_path: Path, written: list[Path], damage: str) -> None:
    prefix = corpus.build_corpus(tmp_path, megabytes=0.001)
    data = prefix.with_suffix(".bin")
    whole = data.read_bytes()
    match damage:
        case "shorter":
            data.write_bytes(whole[:-1])
        case "changed":
            data.write_bytes(b"T" + whole[1:])
        case "missing":
            data.unlink()
        case "unsealed":
            (prefix.parent / "sha256.json").unlink()
    assert corpus.build_corpus(tmp_path, megabytes=0.001) == prefix
    assert data.read_bytes() == whole
    assert len(written) == 2
    assert [path.name for path in tmp_path.iterdir()] == [prefix.parent.name]
