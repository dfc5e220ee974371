"""Check a command line with Megatron's own parser and the plugin's rules in another process."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_wallfacer.errors import WallfacerError
from megatron_wallfacer.presets.script_flags import flags_of_script

if TYPE_CHECKING:
    from megatron_wallfacer.presets.preset import Preset

_FLAG = re.compile(r"--[A-Za-z0-9][A-Za-z0-9_-]*")


@dataclass(frozen=True)
class Problem:
    """One error in a preset.

    Attributes:
        place: file and line of the flag in the preset; only the file if the preset does not set the flag.
        text: error message, which begins with the flag.
    """

    place: str
    text: str

    def __str__(self) -> str:
        return f"{self.place}: {self.text}"


@dataclass(frozen=True)
class CheckResult:
    """Result of checking one preset.

    Attributes:
        megatron: version of the Megatron whose parser was used.
        problems: errors of the preset.
        grid: scheme and axes; None if there are problems, the plugin is off, or ``rules`` is False.
        rules: whether the plugin checked its flags. The check requires a preset with a model.
        kernel: whether the attention kernel was checked. The check requires a node with the preset's device.
    """

    megatron: str
    problems: tuple[Problem, ...]
    grid: str | None
    rules: bool
    kernel: bool


def check_presets(
    presets: Sequence[Preset], megatron_path: Path | None = None, script: Path | None = None
) -> list[CheckResult]:
    """Check presets in one process, because the import of Megatron takes most of the time.

    Args:
        presets: presets to check. The device of a preset is the CPU if the preset hides all GPUs, else CUDA.
        megatron_path: Megatron-LM checkout, or None for the installed Megatron.
        script: Megatron script, whose own flags are allowed.

    Raises:
        WallfacerError: Megatron is missing, or importing Megatron fails.
    """
    script_flags = flags_of_script(script) if script else frozenset[str]()
    output = _run_parser([_request(preset, script_flags) for preset in presets], megatron_path)
    results = []
    for preset, result in zip(presets, output["results"], strict=True):
        problems = tuple(_problem(preset, problem["text"]) for problem in result["problems"])
        results.append(CheckResult(output["megatron"], **result | {"problems": problems}))
    return results


def environment_for(megatron_path: Path | None) -> dict[str, str]:
    """Return an environment to import Megatron from ``megatron_path``, or the installed Megatron if the path is None.

    Raises:
        WallfacerError: The folder is not a checkout.
    """
    if megatron_path and not (megatron_path / "megatron").is_dir():
        raise WallfacerError(f"--megatron-path {megatron_path}: must be a Megatron-LM checkout with a folder megatron")
    paths = [str(megatron_path.resolve())] if megatron_path else []
    return os.environ | {"PYTHONPATH": os.pathsep.join([*paths, *filter(None, [os.environ.get("PYTHONPATH")])])}


def _request(preset: Preset, script_flags: frozenset[str] | None) -> dict[str, Any]:
    # None means that the script computes names of flags at run time, so any flag of the preset is allowed.
    return {
        "script_flags": sorted(preset.model if script_flags is None else script_flags),
        "flags": [entry.arguments for entry in preset.model.values()],
        "ranks": preset.ranks,
        "device": "cuda" if preset.on_gpus else "cpu",
    }


def _problem(preset: Preset, text: str) -> Problem:
    # The location is that of the first flag in the text that is in the preset.
    locations = map(preset.location, _FLAG.findall(text))
    place = next((str(location) for location in locations if location), str(preset.path))
    return Problem(place, text)


def _run_parser(requests: list[dict[str, Any]], megatron_path: Path | None) -> dict[str, Any]:
    """Run ``parser_process`` with requests on stdin, and return its result."""
    environment = environment_for(megatron_path) | {"WORLD_SIZE": "1", "RANK": "0"}
    # -P ignores the current folder, which may contain a folder `megatron` that is not Megatron.
    command = [sys.executable, "-P", "-W", "ignore", "-m", "megatron_wallfacer.megatron.parser_process"]
    done = subprocess.run(command, input=json.dumps(requests), capture_output=True, text=True, env=environment)
    if done.returncode != 0:
        last_line = (done.stderr.strip() or "no error text").splitlines()[-1]
        raise WallfacerError(f"the process that runs Megatron's parser failed: {last_line}")
    output = json.loads(done.stdout)
    if "error" in output:
        raise WallfacerError(output["error"])
    return output
