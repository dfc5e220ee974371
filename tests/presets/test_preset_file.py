"""One file: read as it is written, and every mistake is one line that names the place."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_wallfacer.errors import WallfacerError
from megatron_wallfacer.presets.preset_file import MODEL, read_source

MISTAKES = {
    "unknown key": ("MODEL_ARGS: {}\nMODEL: {}\n", 2, "MODEL: is not a key that exists"),
    "twice at the top": (
        "MODEL_ARGS: {}\nENV_VARS: {}\nMODEL_ARGS: {}\n",
        3,
        "MODEL_ARGS: stands twice, first in line 1",
    ),
    "twice in a section": ("MODEL_ARGS:\n  --a: 1\n  --b: 2\n  --a: 3\n", 4, "--a: stands twice, first in line 2"),
    "not a mapping": ("- a\n", 1, "the file: must be a mapping"),
    "section is no mapping": ("ENV_VARS:\n  - A=1\n", 2, "ENV_VARS: must be a mapping"),
    "section is nothing": ("MODEL_ARGS:\n", 1, "MODEL_ARGS: must be a mapping"),
    "key is a list": ("MODEL_ARGS:\n  [a]: 1\n", 2, "MODEL_ARGS: a key must be a name"),
    "no flag": ("MODEL_ARGS:\n  num-layers: 1\n", 2, "num-layers: must be a flag as it is typed"),
    "a flag with its value": ("MODEL_ARGS:\n  --lr=1: 1\n", 2, "--lr=1: must be a flag as it is typed"),
    "nothing for a flag": ("MODEL_ARGS:\n  --a: 1\n  --bf16:\n", 3, "--bf16: must be a word"),
    "another truth": ("MODEL_ARGS:\n  --bf16: yes\n", 2, "--bf16: yes: must be a word"),
    "mapping for a flag": ("MODEL_ARGS:\n  --a:\n    b: 1\n", 3, "--a: must be a word"),
    "empty list": ("MODEL_ARGS:\n  --a: []\n", 2, "--a: a list must hold words"),
    "list of switches": ("MODEL_ARGS:\n  --a: [1, true]\n", 2, "--a: a list must hold words"),
    "a tag": ("MODEL_ARGS:\n  --a: !!python/name:os.system\n", 2, "not YAML: tags are not supported"),
    "a merge": ("MODEL_ARGS:\n  <<: {--a: 1}\n", 2, "<<: must be a flag"),
    "torchrun's among Megatron's": ("MODEL_ARGS:\n  --nnodes: 1\n", 2, "--nnodes: is torchrun's, so it belongs under"),
    "no variable": ("ENV_VARS:\n  A-B: 1\n", 2, "A-B: is no name of a variable"),
    "switch for a variable": ("ENV_VARS:\n  A: true\n", 2, "A: must be one word or number"),
    "list for a variable": ("ENV_VARS:\n  A: [1]\n", 2, "A: must be one word or number"),
    "not torchrun's": ("TORCHRUN_ARGS:\n  --lr: 1\n", 2, "--lr: must be one of --nnodes"),
    "no count": ("TORCHRUN_ARGS:\n  --nnodes: 1:4\n", 2, "--nnodes 1:4: must be a positive whole number"),
    "count of nothing": ("TORCHRUN_ARGS:\n  --nproc-per-node: 0\n", 2, "--nproc-per-node 0: must be a positive"),
    "torchrun's switch": ("TORCHRUN_ARGS:\n  --nnodes: true\n", 2, "--nnodes: must be one word or number"),
    "extends no list": ("extends: a.yaml\n", 1, "extends: must be a list of files"),
    "extends no word": ("extends:\n  - 3\n", 2, "extends: must be a list of files"),
    "extends what is not there": ("extends:\n  - other.yaml\n", 2, "extends other.yaml: there is no file"),
    "not YAML": ("MODEL_ARGS:\n  --a: [1\n", 3, "not YAML: expected ',' or ']'"),
    "two documents": ("MODEL_ARGS: {}\n---\nMODEL_ARGS: {}\n", 2, "not YAML: but found another document"),
    "a control character": ("MODEL_ARGS: {}\n# \x07\n", 2, "not YAML: special characters are not allowed"),
    "empty": ("# nothing\n", 1, "says nothing"),
}


@pytest.mark.parametrize(("text", "line", "message"), MISTAKES.values(), ids=MISTAKES.keys())
def test_a_mistake_is_one_line_with_its_place(tmp_path: Path, text: str, line: int, message: str) -> None:
    file = tmp_path / "preset.yaml"
    file.write_text(text)
    with pytest.raises(WallfacerError) as caught:
        read_source(file)
    assert str(caught.value).startswith(f"{file}:{line}: {message}")
    assert len(str(caught.value).splitlines()) == 1


def test_a_file_that_is_not_there_or_is_no_text(tmp_path: Path) -> None:
    with pytest.raises(WallfacerError, match=r"none\.yaml: No such file"):
        read_source(tmp_path / "none.yaml")
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(WallfacerError, match=r"bytes\.yaml:1: is not UTF-8"):
        read_source(tmp_path / "bytes.yaml")


def test_words_are_as_they_are_written(tmp_path: Path) -> None:
    """What YAML would make numbers, dates or truths of is for Megatron's parser to read."""
    written = ["1e-5", "0.10", "010", "1_000", "2026-01-01", "98,2,0", "1:30", "'true'", '"~"', '""', "([0]*3+[1])*2"]
    file = tmp_path / "preset.yaml"
    file.write_text("MODEL_ARGS:\n" + "".join(f"  --f{n}: {word}\n" for n, word in enumerate(written)))
    settings = read_source(file).sections[MODEL].values()
    assert [setting.words for setting in settings] == [(word.strip("'\""),) for word in written]
    assert [setting.origin.line for setting in settings] == list(range(2, 2 + len(written)))
