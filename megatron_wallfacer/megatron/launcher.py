"""Runs the user's own Megatron script with the plugin installed.

    torchrun --nproc-per-node 8 -m megatron_wallfacer /path/to/Megatron-LM/pretrain_gpt.py <Megatron's arguments>

The script is neither copied nor edited: it is executed as `python script.py` would, after the hooks are in. On a
machine without CUDA the CPU runtime comes first, and the same command trains on CPU ranks over gloo.
"""

from __future__ import annotations

import contextlib
import json
import os
import runpy
import sys
import time
from pathlib import Path

from megatron_wallfacer.errors import DisagreementError, WallfacerError
from megatron_wallfacer.megatron.version import Version, check_supported, megatron_version

USAGE = "usage: [torchrun ...] -m megatron_wallfacer SCRIPT [Megatron's arguments] [--wallfacer-...]"


def main(argv: list[str]) -> int:
    """Run `argv[0]`, a Megatron script, with the rest of `argv` as its arguments.

    Returns:
        The exit code: 0, or 2 after one line on stderr (`wallfacer: error: ...`) for a request that cannot be met.
        What the script itself raises, SystemExit included, passes through.
    """
    try:
        script, arguments = _split(argv)
        _look_like_python_script(script)
        version = megatron_version()
        check_supported(version)
        device, arguments = _choose_device(arguments)
        sys.argv = [str(script), *arguments]
        _install_hooks(version, device)
        runpy.run_path(str(script), run_name="__main__")
    except WallfacerError as error:
        _report(error)
        return 2
    return 0


def _split(argv: list[str]) -> tuple[Path, list[str]]:
    """The script's path and its arguments.

    Raises:
        WallfacerError: No script is named, or there is no such file. Nothing heavy is imported yet.
    """
    if not argv or argv[0].startswith("-"):
        raise WallfacerError(f"the first argument must be the path of a Megatron script; {USAGE}")
    script = Path(argv[0])
    if not script.is_file():
        raise WallfacerError(f"{script} is not a file; give the path of pretrain_gpt.py in a Megatron-LM checkout")
    return script, argv[1:]


def _look_like_python_script(script: Path) -> None:
    """Put the script's folder where `python script.py` puts it: a checkout's own `megatron` package then wins."""
    if not sys.flags.safe_path:
        sys.path[0] = os.path.dirname(os.path.realpath(script))


def _choose_device(arguments: list[str]) -> tuple[str, list[str]]:
    """Leave a machine with CUDA alone; prepare any other for training on the CPU. Rank 0 says which it is.

    Returns:
        ``cuda`` or ``cpu``, and the arguments that the script shall see.

    Raises:
        WallfacerError: The arguments ask for what only CUDA can do.
    """
    import torch

    from megatron_wallfacer.megatron import cpu_runtime

    # Where the CPU runtime is in already (ranks forked from a warm process), torch claims to have CUDA.
    if torch.cuda.is_available() and not cpu_runtime.is_installed():
        _say(f"CUDA, {torch.cuda.device_count()} devices here")
        return "cuda", arguments
    check_that_torch_sees_gpus()
    adapted, added = cpu_runtime.adapt_argv(arguments)
    ranks = os.environ.get("WORLD_SIZE", "1")
    _say(f"no CUDA here: {ranks} ranks on the CPU over gloo; added {' '.join(added) or 'nothing'}")
    cpu_runtime.install()
    return "cpu", adapted


def check_that_torch_sees_gpus() -> None:
    """Check that torch finds CUDA where there is a GPU: a broken node must not join a job of GPUs as CPU ranks.

    Raises:
        WallfacerError: There is a GPU here, or one was asked for, and torch finds no CUDA.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible in ("", "-1", "NoDevFiles"):
        return  # said on purpose: the CPU
    device = Path("/dev/nvidia0")
    if visible is None and not device.exists():
        return
    found = f"{device} exists" if visible is None else f"CUDA_VISIBLE_DEVICES={visible}"
    raise WallfacerError(
        f"{found}, but torch {sys.modules['torch'].__version__} finds no CUDA on this machine: repair it, "
        "or set CUDA_VISIBLE_DEVICES= (empty) to train on the CPU"
    )


def _install_hooks(version: Version, device: str) -> None:
    """Install the plugin. The device is decided, Megatron's modules may be imported, the script has not run yet."""
    import torch

    from megatron_wallfacer.megatron import any_device
    from megatron_wallfacer.megatron.hooks import Hooks
    from megatron_wallfacer.megatron.plugin_state import PluginState

    any_device.install()
    Hooks(PluginState(version, torch.device(device))).install()


def _say(line: str) -> None:
    """One line on rank 0's stdout."""
    if os.environ.get("RANK", "0") == "0":
        print(f"wallfacer: {line}", flush=True)


def _report(error: WallfacerError) -> None:
    """One line on stderr, of ranks that disagree one per setting. What all ranks find alike is one line a machine."""
    _record_for_torchrun(error)
    alike = isinstance(error, DisagreementError) or _found_by_all()
    if alike and "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("LOCAL_RANK", "0") != "0":
        # torchrun ends all ranks as soon as one has ended; the one that speaks must have come first.
        time.sleep(10.0)
    rank = "" if alike else f"rank {os.environ.get('RANK', '0')}: "
    for line in str(error).splitlines():
        print(f"wallfacer: error: {rank}{line}", file=sys.stderr, flush=True)


def _record_for_torchrun(error: WallfacerError) -> None:
    """Write the error where torchrun's agent reads it for its own summary."""
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        text = f"wallfacer: error: {error}"
        # torchrun prints the call stack where there is one.
        extra = {"py_callstack": text, "timestamp": str(int(time.time()))}
        with contextlib.suppress(OSError):  # the disk may be full: stderr has all of it
            Path(path).write_text(json.dumps({"message": {"message": text, "extraInfo": extra}}))


def _found_by_all() -> bool:
    """Whether all ranks of this machine are under torchrun, and still where they cannot differ."""
    distributed = sys.modules.get("torch.distributed")
    return "TORCHELASTIC_RUN_ID" in os.environ and not (distributed and distributed.is_initialized())
