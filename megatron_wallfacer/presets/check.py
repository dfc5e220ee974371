"""Would Megatron take this command line? Asked of its own parser and of the plugin's rules, in another process."""

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
    """What is wrong, and where: file and line, or the preset as a whole where nobody wrote it."""

    place: str
    text: str

    def __str__(self) -> str:
        return f"{self.place}: {self.text}"


@dataclass(frozen=True)
class Verdict:
    """On one preset.

    Attributes:
        megatron: version of the Megatron that was asked.
        problems: none where it is good.
        grid: scheme and axes that the plugin would use; None where it is off or was not asked.
        rules: whether the plugin's rules were asked too. A part of a preset, without a model, has only its flags.
        kernel: whether the local kernel was asked too; not where the device is on another machine.
    """

    megatron: str
    problems: tuple[Problem, ...]
    grid: str | None
    rules: bool
    kernel: bool


def check_presets(
    presets: Sequence[Preset], megatron_path: Path | None = None, script: Path | None = None
) -> list[Verdict]:
    """Check presets; one process for all, since importing Megatron takes longest.

    Args:
        presets: what to check, each for the device that it is meant for: the CPU where it hides all GPUs.
        megatron_path: a checkout; the installed Megatron unless given.
        script: Megatron script that is to run; flags that it adds itself are good.

    Raises:
        WallfacerError: there is no Megatron to ask, or it cannot be imported.
    """
    own = flags_of_script(script) if script else frozenset[str]()
    answer = _ask([_question(preset, own) for preset in presets], megatron_path)
    return [
        Verdict(
            answer["megatron"],
            tuple(_problem(preset, found) for found in verdict["problems"]),
            verdict["grid"],
            verdict["rules"],
            verdict["kernel"],
        )
        for preset, verdict in zip(presets, answer["verdicts"], strict=True)
    ]


def environment_for(megatron_path: Path | None) -> dict[str, str]:
    """Of a process that finds this checkout, if any, in front of what is installed.

    Raises:
        WallfacerError: it is no checkout.
    """
    if megatron_path and not (megatron_path / "megatron").is_dir():
        raise WallfacerError(f"--megatron-path {megatron_path}: must be a Megatron-LM checkout, with megatron/ in it")
    paths = [str(megatron_path.resolve())] if megatron_path else []
    return os.environ | {"PYTHONPATH": os.pathsep.join([*paths, *filter(None, [os.environ.get("PYTHONPATH")])])}


def _question(preset: Preset, own: frozenset[str] | None) -> dict[str, Any]:
    # Where a script makes names of flags while it runs, any flag may be its own.
    return {
        "own": sorted(preset.model if own is None else own),
        "flags": [setting.typed for setting in preset.model.values()],
        "ranks": preset.ranks,
        "device": "cuda" if preset.on_gpus else "cpu",
    }


def _problem(preset: Preset, found: dict[str, str]) -> Problem:
    """At the first flag that its text names and somebody wrote: a default of Megatron's is nobody's line."""
    origins = map(preset.origin, _FLAG.findall(found["text"]))
    place = next((str(origin) for origin in origins if origin), str(preset.path))
    return Problem(place, found["text"])


def _ask(questions: list[dict[str, Any]], megatron_path: Path | None) -> dict[str, Any]:
    """Run ``parser_process`` with the checkout, if any, in front of what is installed."""
    environment = environment_for(megatron_path) | {"WORLD_SIZE": "1", "RANK": "0"}
    # -P: a folder `megatron` where the user happens to stand is not the one that is asked.
    command = [sys.executable, "-P", "-W", "ignore", "-m", "megatron_wallfacer.megatron.parser_process"]
    done = subprocess.run(command, input=json.dumps(questions), capture_output=True, text=True, env=environment)
    if done.returncode != 0:
        last = (done.stderr.strip() or "nothing was said").splitlines()[-1]
        raise WallfacerError(f"Megatron's parser cannot be asked: {last}")
    answer = json.loads(done.stdout)
    if "error" in answer:
        raise WallfacerError(answer["error"])
    return answer
