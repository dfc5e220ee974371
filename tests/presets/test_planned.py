"""Presets of what ``wallfacer plan`` offers pass Megatron's own validation, as on a machine with GPUs."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from megatron_wallfacer.megatron.flags import add_arguments
from megatron_wallfacer.planning.cluster_file import load_cluster
from megatron_wallfacer.planning.configuration import Configuration, Request
from megatron_wallfacer.planning.configuration_flags import configuration_flags, save_flags
from megatron_wallfacer.planning.configuration_table import ROWS
from megatron_wallfacer.planning.configurations import search_configurations
from megatron_wallfacer.planning.model import MODELS

REPOSITORY = Path(__file__).parents[2]
CONFIGS = REPOSITORY / "configs"
TARGET = Request(MODELS["llama3-8b"], load_cluster("h100-8x8", 1), 1 << 20)
#: Nothing recomputed, with and without bf16 gradients.
SHORT = replace(TARGET, tokens=1 << 17, tp=1)

configurations = cache(search_configurations)


def rows() -> Iterator[Configuration]:
    yield from configurations(TARGET).best[:ROWS]
    yield from configurations(SHORT).best[:2]


def saved(folder: Path, number: int, configuration: Configuration) -> Path:
    """A recipe of shipped parts and the preset that ``--save`` writes."""
    flags = folder / f"flags-{number}.yaml"
    save_flags(flags, configuration_flags(configuration), "wallfacer plan")
    parts = [f"model/{configuration.request.model.name}", "train/bf16", "data/mock", "env/gpu"]
    names = ", ".join([*(str(CONFIGS / f"{part}.yaml") for part in parts), str(flags)])
    recipe = folder / f"planned-{number}.yaml"
    recipe.write_text(f"extends: [{names}]\nTORCHRUN_ARGS: {{--nproc-per-node: 8}}\n")
    return recipe


def test_megatron_validates_every_row(tmp_path: Path) -> None:
    offered = list(rows())
    files = [saved(tmp_path, number, one) for number, one in enumerate(offered)]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.presets.validate", *map(str, files)],
        cwd=REPOSITORY,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line.split()[:3] for line in done.stdout.splitlines() if line.startswith("planned-")]
    sizes = [[f"planned-{number}", "1", str(one.sizes.cp)] for number, one in enumerate(offered)]
    assert lines == sizes


@pytest.mark.parametrize("request_", [TARGET, SHORT], ids=["1M", "128K"])
def test_every_flag_exists(request_: Request) -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    known = parser._option_string_actions.keys()
    for one in configurations(request_).best:
        flags = configuration_flags(one).keys()
        assert {flag for flag in flags if flag.startswith("--wallfacer-")} <= known
