from copy import deepcopy
from pathlib import Path

import pytest

pytest.importorskip("yaml", reason="settings are YAML: PyYAML, of the dev extra, is not installed")

from benchmarks.config import ConfigError, load_config, parse_config
from benchmarks.schemes import contenders
from megatron_wallfacer.errors import WallfacerError

CONFIGS = Path(__file__).resolve().parents[2] / "benchmarks" / "configs"
GOOD = {
    "topology": {"nodes": 2, "ranks_per_node": 2, "inter_mbit": 100, "intra_mbit": "unlimited"},
    "shape": {"tokens": 64, "heads": 4, "kv_heads": 2, "head_dim": 16},
    "compute": {"mode": "sleep", "gflops_per_rank": 10},
}


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_setting_of_the_repository_loads_and_has_schemes(path):
    assert contenders(load_config(path), None)


def test_a_setting_is_read_as_written():
    config = parse_config(GOOD, "name")
    assert (config.topology.ranks, config.topology.nic, config.topology.inter_mbit) == (4, "rank", 100)
    assert config.topology.intra_mbit is None
    assert (config.shape.kv_heads, config.shape.dtype, config.compute.mode) == (2, "float32", "sleep")


@pytest.mark.parametrize(
    ("section", "entry", "value", "words"),
    [
        ("topology", "nodes", 0, "topology.nodes=0"),
        ("topology", "nodes", "two", "topology.nodes='two'"),
        ("topology", "nodes", True, "topology.nodes=True"),
        ("topology", "nic", "host", "topology.nic=host"),
        ("topology", "inter_mbit", -1, "topology.inter_mbit=-1"),
        ("topology", "inter_mbit", "fast", "topology.inter_mbit=fast"),
        ("topology", "nodes", 1000, "2000 ranks"),
        ("topology", "speed", 1, "topology.speed"),
        ("shape", "tokens", 60, "multiple of 2 x 4 ranks"),
        ("shape", "kv_heads", 3, "must divide heads 4"),
        ("shape", "dtype", "int8", "shape.dtype=int8"),
        ("compute", "mode", "guess", "compute.mode=guess"),
        ("compute", "gflops_per_rank", 0, "must be positive"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_entry(section, entry, value, words):
    data = deepcopy(GOOD)
    data[section][entry] = value
    with pytest.raises(ConfigError) as caught:
        parse_config(data, "name")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("section", ["topology", "shape", "compute"])
def test_a_missing_section_is_named(section):
    data = {name: entries for name, entries in GOOD.items() if name != section}
    with pytest.raises(ConfigError, match=f"{section}: is missing"):
        parse_config(data, "name")


@pytest.mark.parametrize(("text", "words"), [("a: [1", "not YAML"), ("- 1", "must be a mapping")])
def test_a_broken_file_is_one_line_with_its_path(tmp_path, text, words):
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(WallfacerError) as caught:
        load_config(path)
    assert str(caught.value).startswith(f"{path}:1: ")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there_is_one_line(tmp_path):
    with pytest.raises(WallfacerError, match="No such file"):
        load_config(tmp_path / "none.yaml")


def test_a_setting_adds_schemes_of_its_own():
    schemes = {"mine": {"scheme": "team-ring", "team_size": 2, "keep_gathered_q": True}}
    labels = [one.label for one in contenders(parse_config({**GOOD, "schemes": schemes}, "name"), ["mine", "usp-*"])]
    assert labels == ["mine", "usp-2", "usp-4"]


def test_a_scheme_without_its_name_is_rejected():
    with pytest.raises(ConfigError, match=r"schemes\.mine"):
        parse_config({**GOOD, "schemes": {"mine": {"team_size": 2}}}, "name")
