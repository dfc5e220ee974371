"""Old words stay out: identifiers, flags and phrases that this project has replaced (tests/vocabulary.toml)."""

from __future__ import annotations

import re
import subprocess
import tomllib
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LIST = ROOT / "tests" / "vocabulary.toml"
WORDS = tomllib.loads(LIST.read_text())
KINDS = {".py", ".md", ".sh", ".sbatch", ".yaml", ".yml", ".toml", ".js", ".html", ".css", ".csv", ""}
#: It maps old names to new ones.
EXEMPT = {ROOT / "CHANGELOG.md", LIST}
IDENTIFIER = re.compile(r"[A-Za-z][A-Za-z0-9]*(?:[_-]+[A-Za-z0-9]+)*")
PART = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[0-9]+")


@cache
def texts() -> dict[Path, str]:
    """Every committed text file."""
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    paths = [ROOT / name for name in names.split("\0") if name]
    return {path: path.read_text() for path in paths if path.suffix in KINDS and path not in EXEMPT and path.is_file()}


@cache
def parts(identifier: str) -> str:
    """An identifier's words in lower case, between underscores: ``NextVisit`` is ``_next_visit_``."""
    return f"_{'_'.join(PART.findall(identifier)).lower()}_"


@cache
def identifiers() -> dict[str, set[str]]:
    """Files by the parts of the identifiers in them."""
    found: dict[str, set[str]] = {}
    for path, text in texts().items():
        for identifier in set(IDENTIFIER.findall(text)):
            found.setdefault(parts(identifier), set()).add(str(path.relative_to(ROOT)))
    return found


def places_of_identifier(old: str) -> list[str]:
    return sorted({path for name, paths in identifiers().items() if f"_{old}_" in name for path in paths})


def places_of_phrase(old: str) -> list[str]:
    phrase = re.compile(rf"\b{re.escape(old)}\b".replace(r"\ ", r"\s+"), re.IGNORECASE)
    return sorted(str(path.relative_to(ROOT)) for path, text in texts().items() if phrase.search(text))


@pytest.mark.parametrize("old", WORDS["identifiers"])
def test_old_identifiers_stay_out(old: str) -> None:
    assert not places_of_identifier(old), f"{old}: use {WORDS['identifiers'][old]}"


@pytest.mark.parametrize("old", WORDS["phrases"])
def test_old_phrases_stay_out(old: str) -> None:
    assert not places_of_phrase(old), f"{old!r}: use {WORDS['phrases'][old]}"


@pytest.mark.parametrize(
    ("text", "found"), [("NextVisit", "_next_visit_"), ("head_dim", "_head_dim_"), ("LSEOf", "_lse_of_")]
)
def test_identifiers_are_split_at_underscores_and_capitals(text: str, found: str) -> None:
    assert parts(text) == found
