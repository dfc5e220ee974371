"""One file: values stay text, and every mistake is one line with file and line number."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_wallfacer.errors import WallfacerError
from megatron_wallfacer.presets.preset_file import MODEL, read_preset_file

MISTAKES = {
    "unknown key": ("MODEL_ARGS: {}\nMODEL: {}\n", 2, "MODEL: must be one of extends"),
    "twice at the top": (
        "MODEL_ARGS: {}\nENV_VARS: {}\nMODEL_ARGS: {}\n",
        3,
        "MODEL_ARGS: must occur only once, is already in line 1",
    ),
    "twice in a section": (
        "MODEL_ARGS:\n  --a: 1\n  --b: 2\n  --a: 3\n",
        4,
        "--a: must occur only once, is already in",
    ),
    "not a mapping": ("- a\n", 1, "the file: must be a mapping"),
    "section is no mapping": ("ENV_VARS:\n  - A=1\n", 2, "ENV_VARS: must be a mapping"),
    "section is nothing": ("MODEL_ARGS:\n", 1, "MODEL_ARGS: must be a mapping"),
    "key is a list": (
        "MODEL_ARGS:\n  [a]: 1\n",
        2,
        "MODEL_ARGS: a key is a list or a mapping; must be a word or number",
    ),
    "no flag": ("MODEL_ARGS:\n  num-layers: 1\n", 2, "num-layers: must be a flag with its dashes"),
    "a flag with its value": ("MODEL_ARGS:\n  --lr=1: 1\n", 2, "--lr=1: must be a flag with its dashes"),
    "nothing for a flag": ("MODEL_ARGS:\n  --a: 1\n  --bf16:\n", 3, "--bf16: must be a word"),
    "another truth": ("MODEL_ARGS:\n  --bf16: yes\n", 2, "--bf16: yes: must be a word"),
    "mapping for a flag": ("MODEL_ARGS:\n  --a:\n    b: 1\n", 3, "--a: must be a word"),
    "empty list": ("MODEL_ARGS:\n  --a: []\n", 2, "--a: a list must hold words"),
    "list of switches": ("MODEL_ARGS:\n  --a: [1, true]\n", 2, "--a: a list must hold words"),
    "a tag": ("MODEL_ARGS:\n  --a: !!python/name:os.system\n", 2, "not YAML: tags are not supported"),
    "a merge": ("MODEL_ARGS:\n  <<: {--a: 1}\n", 2, "<<: must be a flag"),
    "torchrun's among Megatron's": ("MODEL_ARGS:\n  --nnodes: 1\n", 2, "--nnodes: is a flag of torchrun and must be"),
    "no variable": ("ENV_VARS:\n  A-B: 1\n", 2, "A-B: must be the name of an environment variable"),
    "switch for a variable": ("ENV_VARS:\n  A: true\n", 2, "A: must be one word or number"),
    "list for a variable": ("ENV_VARS:\n  A: [1]\n", 2, "A: must be one word or number"),
    "not torchrun's": ("TORCHRUN_ARGS:\n  --lr: 1\n", 2, "--lr: must be one of --nnodes"),
    "no count": ("TORCHRUN_ARGS:\n  --nnodes: 1:4\n", 2, "--nnodes 1:4: must be a positive whole number"),
    "count of nothing": ("TORCHRUN_ARGS:\n  --nproc-per-node: 0\n", 2, "--nproc-per-node 0: must be a positive"),
    "torchrun's switch": ("TORCHRUN_ARGS:\n  --nnodes: true\n", 2, "--nnodes: must be one word or number"),
    "extends no list": ("extends: a.yaml\n", 1, "extends: must be a list of files"),
    "extends no word": ("extends:\n  - 3\n", 2, "extends: must be a list of files"),
    "extends what is not there": ("extends:\n  - other.yaml\n", 2, "extends other.yaml: must be a file"),
    "statement of nothing": ("MODEL_ARGS: {}\nmeasured:\n", 2, "measured: must be a text or a list of texts"),
    "statement with a switch": ("MODEL_ARGS: {}\nmeasured: [true]\n", 2, "measured: must be a text or a list"),
    "not YAML": ("MODEL_ARGS:\n  --a: [1\n", 3, "not YAML: expected ',' or ']'"),
    "two documents": ("MODEL_ARGS: {}\n---\nMODEL_ARGS: {}\n", 2, "not YAML: but found another document"),
    "a control character": ("MODEL_ARGS: {}\n# \x07\n", 2, "not YAML: special characters are not allowed"),
    "empty": ("# nothing\n", 1, "is empty"),
}


@pytest.mark.parametrize(("text", "line", "message"), MISTAKES.values(), ids=MISTAKES.keys())
def test_a_mistake_is_one_line_with_its_place(tmp_path: Path, text: str, line: int, message: str) -> None:
    file = tmp_path / "preset.yaml"
    file.write_text(text)
    with pytest.raises(WallfacerError) as caught:
        read_preset_file(file)
    assert str(caught.value).startswith(f"{file}:{line}: {message}")
    assert len(str(caught.value).splitlines()) == 1


def test_a_file_that_is_not_there_or_is_no_text(tmp_path: Path) -> None:
    with pytest.raises(WallfacerError, match=r"none\.yaml: No such file"):
        read_preset_file(tmp_path / "none.yaml")
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(WallfacerError, match=r"bytes\.yaml:1: is not UTF-8"):
        read_preset_file(tmp_path / "bytes.yaml")


def test_values_stay_text(tmp_path: Path) -> None:
    """Megatron's parser reads numbers, dates and truth values, not YAML."""
    written = ["1e-5", "0.10", "010", "1_000", "2026-01-01", "98,2,0", "1:30", "'true'", '"~"', '""', "([0]*3+[1])*2"]
    file = tmp_path / "preset.yaml"
    file.write_text("MODEL_ARGS:\n" + "".join(f"  --f{n}: {word}\n" for n, word in enumerate(written)))
    entries = read_preset_file(file).sections[MODEL].values()
    assert [entry.values for entry in entries] == [(word.strip("'\""),) for word in written]
    assert [entry.location.line for entry in entries] == list(range(2, 2 + len(written)))
