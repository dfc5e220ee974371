"""What one Megatron can do with the plugin, as far as no training loop is needed. Run in a process of its own.

    python -m scripts.versions.probe FOLDER      FOLDER holds the `megatron` package to try

The last line of stdout is JSON: results by name, each ``ok``, a figure, or what went wrong in one line.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_wallfacer.megatron.hooks import Hooks
from megatron_wallfacer.megatron.layers import count_layers
from megatron_wallfacer.megatron.plugin_state import PluginState
from megatron_wallfacer.megatron.releases import version_text
from megatron_wallfacer.megatron.version import Version, megatron_version
from scripts.versions import model

RANKS = 2
NO_LOOP = "no megatron.training in the wheel"


def main(folder: Path) -> None:
    """Try everything, print the findings."""
    _use(folder)
    version = megatron_version()
    model.prepare()
    found: dict[str, str | float] = {"version": version_text(version), **_hooks(version, folder)}
    with tempfile.TemporaryDirectory() as scratch:
        found |= _forked(1, Path(scratch), _whole) or _forked(RANKS, Path(scratch), _split)
    print(json.dumps(found))


def _use(folder: Path) -> None:
    """See only this `megatron`: the package is a namespace, in which the environment's own would fill the gaps."""
    sys.path.insert(0, str(folder))
    import megatron

    megatron.__path__ = [str(folder / "megatron")]


def _hooks(version: Version, folder: Path) -> dict[str, str]:
    """Each hook applied, verified and taken out again."""
    hooks = Hooks(PluginState(version, torch.device("cpu")))
    found = {}
    for hook in hooks.every:
        if not hook.fits(version):
            continue  # known not to be needed, or not to be there
        if hook.target.startswith("megatron.training") and not (folder / "megatron" / "training").is_dir():
            found[f"hook {hook.name}"] = NO_LOOP
            continue
        found[f"hook {hook.name}"] = _tried(lambda hook=hook: (hook.apply(version), hook.verify(version)))
        hook.undo(version)
    return found


def _tried(attempt: Callable[[], object]) -> str:
    try:
        attempt()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "ok"


def _whole(rank: int, scratch: Path) -> dict[str, str | float]:
    """Without the plugin, on one rank: what the others are compared with."""
    model.join(0, 1, scratch / "whole")
    loss, gradients, _ = model.loss_and_gradients(0, 1)
    torch.save((loss, gradients), scratch / "whole.pt")
    return {}


def _split(rank: int, scratch: Path) -> dict[str, str | float]:
    """With the plugin: groups by the hook, every layer ours, loss and gradients of the whole."""
    os.environ["WORLD_SIZE"] = str(RANKS)  # read by the checks of unsupported combinations; torchrun sets it
    state = PluginState(megatron_version(), torch.device("cpu"))
    hooks = Hooks(state)
    model.settle(state, RANKS)
    for hook in hooks.core:
        if not hook.target.startswith("megatron.training"):
            hook.apply(state.version)
    model.join(rank, RANKS, scratch / "split")
    loss, gradients, built = model.loss_and_gradients(rank, RANKS)
    wanted, wanted_gradients = torch.load(scratch / "whole.pt")
    count = count_layers([built])
    largest = max(
        ((gradients[name] - want).abs().max() / want.abs().max()).item() for name, want in wanted_gradients.items()
    )
    return {
        "groups": "ok" if len(state.axis_groups) == 1 else "none",
        "layers": "ok" if count.ours == count.total == model.LAYERS else f"{count.ours} of {count.total}",
        "loss": abs(loss - wanted) / abs(wanted),
        "gradients": largest,
    }


def _forked(ranks: int, scratch: Path, job: Callable[[int, Path], dict[str, str | float]]) -> dict[str, str | float]:
    """A job on forks of this process, which has imported everything once; what rank 0 found, or what went wrong."""
    children = []
    for rank in range(ranks):
        if (child := os.fork()) == 0:
            _be(rank, scratch, job)
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    told = [json.loads((scratch / f"{job.__name__}{rank}.json").read_text()) for rank in range(ranks)]
    failed = [text for text, code in zip(told, codes, strict=True) if code != 0]
    return failed[0] if failed else told[0]


def _be(rank: int, scratch: Path, job: Callable[[int, Path], dict[str, str | float]]) -> None:
    code, found = 0, {}
    sys.stdout.flush()
    os.dup2(2, 1)
    try:
        torch.set_num_threads(1)
        found = job(rank, scratch)
        dist.barrier()
    except BaseException as error:
        traceback.print_exc()
        code, found = 1, {"model": f"{type(error).__name__}: {error}".splitlines()[0]}
    (scratch / f"{job.__name__}{rank}.json").write_text(json.dumps(found))
    os._exit(code)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
