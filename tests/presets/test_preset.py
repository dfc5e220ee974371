"""Files on top of each other, and what is typed on top of all."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_wallfacer.errors import WallfacerError
from megatron_wallfacer.presets.preset import load_preset
from megatron_wallfacer.shipped import CONFIGS


@pytest.fixture
def presets(tmp_path: Path) -> Path:
    """Return a folder with base <- middle <- top and other <- top."""
    files = {
        "below/base.yaml": "ENV_VARS:\n  A: 1\n  B: 1\nMODEL_ARGS:\n  --a: 1\n  --b: 1\n  --c: true\n  --d: 1\n",
        "below/middle.yaml": "extends: [base.yaml]\nMODEL_ARGS:\n  --b: [2, two]\n  --d: 2\n",
        "other.yaml": "ENV_VARS:\n  B: 3\nMODEL_ARGS:\n  --d: 3\n  --e: 3\n",
        "top.yaml": "extends:\n  - below/middle.yaml\n  - other.yaml\nMODEL_ARGS:\n  --e: 4\n  --c: false\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_later_files_win_and_each_entry_has_its_location(presets: Path) -> None:
    preset = load_preset(presets / "top.yaml")
    assert preset.argv == "--a 1 --b 2 two --d 3 --e 4".split()
    assert preset.environment == {"A": "1", "B": "3"}
    places = {"--a": "below/base.yaml:5", "--b": "below/middle.yaml:3", "--d": "other.yaml:4", "--e": "top.yaml:5"}
    places |= {"A": "below/base.yaml:2", "B": "other.yaml:2"}
    assert {name: str(preset.location(name)) for name in places} == {
        name: f"{presets}/{place}" for name, place in places.items()
    }
    assert preset.location("--c") is None


def test_statements_are_those_of_the_file_itself(presets: Path) -> None:
    (presets / "below" / "base.yaml").write_text("measured: below\nMODEL_ARGS:\n  --a: 1\n")
    assert load_preset(presets / "top.yaml").statements == {}
    (presets / "top.yaml").write_text("extends: [below/base.yaml]\nmeasured: nothing\nvalidated_on: [a b, c]\n")
    assert load_preset(presets / "top.yaml").statements == {"measured": ("nothing",), "validated_on": ("a b", "c")}


def test_typed_entries_override_the_file(presets: Path) -> None:
    words = "--a=9 --b=false --c --d -1 x --f=false --g false --nproc-per-node 3 --a 8".split()
    preset = load_preset(presets / "top.yaml", words, ["B=b=c", "C="])
    assert preset.argv == "--a 8 --c --d -1 x --e 4 --g false".split()
    assert preset.environment == {"A": "1", "B": "b=c", "C": ""}
    assert preset.ranks == 3
    assert str(preset.location("--d")) == str(preset.location("B")) == "command line"


@pytest.mark.parametrize(
    ("words", "variables", "message"),
    [
        (["x", "--a"], [], "x: must be a flag"),
        (["--nnodes"], [], "--nnodes: must have one value"),
        (["--nnodes=false"], [], "--nnodes: must have one value"),
        (["--nnodes", "0"], [], "command line: --nnodes 0: must be a positive whole number"),
        ([], ["A"], "--env A: must be NAME=VALUE"),
        ([], ["1=2"], "--env 1=2: must be NAME=VALUE"),
    ],
)
def test_a_typed_mistake_is_one_line(presets: Path, words: list[str], variables: list[str], message: str) -> None:
    with pytest.raises(WallfacerError) as caught:
        load_preset(presets / "top.yaml", words, variables)
    assert str(caught.value).startswith(message)


def test_a_cycle_is_named_where_it_closes(presets: Path) -> None:
    (presets / "below/base.yaml").write_text("ENV_VARS: {}\nextends:\n  - ../top.yaml\n")
    with pytest.raises(WallfacerError) as caught:
        load_preset(presets / "top.yaml")
    assert str(caught.value) == (
        f"{presets}/below/base.yaml:3: extends {presets}/top.yaml, which extends this file in turn"
    )


def test_two_ways_to_one_file_are_no_cycle(presets: Path) -> None:
    (presets / "other.yaml").write_text("extends: [below/base.yaml]\n")
    assert load_preset(presets / "top.yaml").argv == "--a 1 --b 1 --d 1 --e 4".split()


def test_a_name_is_a_file_that_comes_with_the_plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_preset(Path("tiny-cpu")).path == CONFIGS / "tiny-cpu.yaml"
    assert load_preset(Path("model/tiny")).path == CONFIGS / "model" / "tiny.yaml"
    Path("tiny-cpu").write_text("MODEL_ARGS: {--seed: 3}\n")
    assert load_preset(Path("tiny-cpu")).argv == ["--seed", "3"]
    with pytest.raises(WallfacerError, match=r"^tiny: must be a file or one of the presets llama3-8b-128k, ll"):
        load_preset(Path("tiny"))
