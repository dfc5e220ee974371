"""The command lines that the plugin ships, as they would start on a GPU with the libraries of this environment."""

from __future__ import annotations

import argparse
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

from benchmarks.gpu import jobs, parity
from benchmarks.gpu.rows import Rows
from benchmarks.gpu.training import Trainer
from megatron_wallfacer.cli import demo as demo_command
from megatron_wallfacer.cli.main import command_parser
from megatron_wallfacer.megatron.needed_arguments import Libraries, complete_for_gpu
from megatron_wallfacer.presets.launch import Launch
from megatron_wallfacer.presets.preset import load_preset
from megatron_wallfacer.shipped import CONFIGS, SCRIPT
from megatron_wallfacer.training_runs import demo, local_run
from tests.megatron.training import corpus

#: Shipped recipes for GPUs; `tiny-cpu` hides them.
PRESETS = sorted(file.stem for file in CONFIGS.glob("*.yaml") if file.stem != "tiny-cpu")
MODELS = sorted(file.stem for file in (CONFIGS / "model").glob("*.yaml"))
LINE = " iteration 1/ 1 | lm loss: 1.0E+00 | grad norm: 1.0"


@dataclass(frozen=True)
class List:
    """A command line.

    Attributes:
        name: in test results.
        argv: Megatron's and the plugin's arguments.
        ranks: of the job.
        variables: that the command sets.
    """

    name: str
    argv: tuple[str, ...]
    ranks: int
    variables: dict[str, str]


def shipped_lists() -> Iterator[List]:
    """All of them; and a preset as it is typed, which no library of this environment may be able to build."""
    yield from _started("demo", _demo)
    yield from _started("parity", _parity)
    yield from _started("job", _job)
    for name in PRESETS:
        preset = load_preset(Path(name), ["--rdzv-endpoint", "node1:29400"])
        launch = Launch.of(preset, SCRIPT)
        argv = launch.command[launch.command.index(str(SCRIPT)) + 1 :]
        yield List(name, argv, preset.ranks, launch.environment)
    yield List("as typed", tuple(preset.argv), preset.ranks, preset.environment)
    if not Libraries.here().transformer_engine:
        yield from map(_of_model, MODELS)


def _of_model(name: str) -> List:
    """A recipe of shipped parts."""
    parts = [f"model/{name}", "parallel/tp2-cp8", "train/bf16", "data/mock", "env/gpu"]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "recipe.yaml"
        names = ", ".join(str(CONFIGS / f"{part}.yaml") for part in parts)
        file.write_text(f"extends: [{names}]\nTORCHRUN_ARGS: {{--nproc-per-node: 16}}\n")
        preset = load_preset(file, "--seq-length 8192 --max-position-embeddings 8192 --global-batch-size 4".split())
    argv = complete_for_gpu(preset.argv, Libraries.here())
    return List(f"model {name}", tuple(argv), preset.ranks, preset.environment)


def _demo(folder: Path) -> None:
    arguments = command_parser().parse_args(["demo", "--directory", str(folder)])
    with mock.patch.object(demo, "count_gpus", return_value=1):
        demo_command._train(arguments, SimpleNamespace(print=lambda *_, **__: None), "team-ring")


def _runs(folder: Path) -> tuple[parity.Runs, Rows, argparse.Namespace]:
    """What the measurements train with on a card."""
    options = argparse.Namespace(
        dtype="bfloat16", kernel="auto", backend="nccl", device="cuda", smoke=False, out=None, budget=None
    )
    rows = Rows("table", ("layers", "run"), ("last loss", "apart", "allowed"), options)
    return parity.Runs(Trainer(folder, 2, options), rows, options), rows, options


def _parity(folder: Path) -> None:
    runs, _, options = _runs(folder)
    parity.train(runs, parity.RANKS, options)


def _job(folder: Path) -> None:
    runs, rows, options = _runs(folder)
    jobs.train(runs, rows, 2, options)


def _started(name: str, start: Callable[[Path], None]) -> list[List]:
    """What is handed to torchrun, which is not started; each command line once."""
    found: dict[tuple[str, ...], List] = {}

    def popen(command: list[str], env: dict[str, str], **_: Any) -> SimpleNamespace:
        argv = tuple(command[command.index(str(SCRIPT)) + 1 :])
        ranks = int(command[command.index("--nproc-per-node") + 1])
        variables = {key: env[key] for key in env if key.startswith("CUDA_")}
        # Megatron's own graphs take TransformerEngine's random states, of which there is no stand-in.
        if "--cuda-graph-impl" not in argv:
            found.setdefault(argv, List(f"{name} {len(found) + 1}", argv, ranks, variables))
        return SimpleNamespace(stdout=iter([LINE]), wait=lambda: 0, poll=lambda: 0)

    instead = SimpleNamespace(Popen=popen, PIPE=subprocess.PIPE, STDOUT=subprocess.STDOUT)
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(local_run, "subprocess", instead):
        (Path(folder) / "corpus").symlink_to(corpus().parents[1])
        start(Path(folder))
    return list(found.values())
