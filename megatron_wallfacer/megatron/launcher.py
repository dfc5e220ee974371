"""Run the user's own Megatron script with the plugin installed.

    torchrun --nproc-per-node 8 -m megatron_wallfacer /path/to/Megatron-LM/pretrain_gpt.py <Megatron's arguments>

The launcher neither copies nor edits the script: it installs the hooks, then executes the script like
`python script.py`. On a node without CUDA the launcher installs the CPU runtime first, and the same command trains on
CPU ranks over gloo.
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
from megatron_wallfacer.megatron.outputs import say
from megatron_wallfacer.megatron.version import Version, check_supported, megatron_version

USAGE = "usage: [torchrun ...] -m megatron_wallfacer SCRIPT [Megatron's arguments] [--wallfacer-...]"


def main(argv: list[str]) -> int:
    """Run the Megatron script `argv[0]` with the other words of `argv` as its arguments.

    Returns:
        The exit code: 0, or 2 after an error message of the plugin on stderr (`wallfacer: error: ...`). Exceptions of
        the script itself, SystemExit included, are not caught.
    """
    try:
        script, arguments = _split(argv)
        if not sys.flags.safe_path:
            # As with `python script.py`, a checkout's own `megatron` has precedence.
            sys.path[0] = os.path.dirname(os.path.realpath(script))
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
    if not argv or argv[0].startswith("-"):
        raise WallfacerError(f"the first argument must be the path of a Megatron script; {USAGE}")
    script = Path(argv[0])
    if not script.is_file():
        raise WallfacerError(f"{script} is not a file; give the path of pretrain_gpt.py in a Megatron-LM checkout")
    return script, argv[1:]


def _choose_device(arguments: list[str]) -> tuple[str, list[str]]:
    """Return ``cuda`` if torch finds a GPU, else ``cpu``, and the arguments for the script.

    Rank 0 prints the device. On the CPU this function also installs the CPU runtime.
    """
    import torch

    from megatron_wallfacer.megatron import cpu_runtime

    # An installed CPU runtime (in ranks forked from a warm process) makes torch report CUDA.
    if torch.cuda.is_available() and not cpu_runtime.is_installed():
        say(f"CUDA, {torch.cuda.device_count()} devices here")
        return "cuda", arguments
    check_that_torch_sees_gpus()
    adapted, added = cpu_runtime.adapt_argv(arguments)
    ranks = os.environ.get("WORLD_SIZE", "1")
    say(f"no CUDA here: {ranks} ranks on the CPU over gloo; added {' '.join(added) or 'nothing'}")
    cpu_runtime.install()
    return "cpu", adapted


def check_that_torch_sees_gpus() -> None:
    """Check that a node without CUDA has no GPU. A broken driver would make its ranks train on the CPU in a GPU job.

    Raises:
        WallfacerError: The node has a GPU, or CUDA_VISIBLE_DEVICES names a GPU, but torch does not find CUDA.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible in ("", "-1", "NoDevFiles"):
        return  # the user chose the CPU
    device = Path("/dev/nvidia0")
    if visible is None and not device.exists():
        return
    found = f"{device} exists" if visible is None else f"CUDA_VISIBLE_DEVICES={visible}"
    raise WallfacerError(
        f"{found}, but torch {sys.modules['torch'].__version__} finds no CUDA: repair the driver or torch, "
        "or set CUDA_VISIBLE_DEVICES= (empty) to train on the CPU"
    )


def _install_hooks(version: Version, device: str) -> None:
    """Import Megatron, replace functions that need missing libraries, and install the plugin's hooks."""
    import torch

    from megatron_wallfacer.megatron import any_device
    from megatron_wallfacer.megatron.hooks import Hooks
    from megatron_wallfacer.megatron.plugin_state import PluginState

    any_device.install()
    Hooks(PluginState(version, torch.device(device))).install()


def _report(error: WallfacerError) -> None:
    """Print the error on stderr.

    If all ranks of a node have the same error, only the first rank prints the error. Each setting that differs between
    ranks takes one line.
    """
    _record_for_torchrun(error)
    alike = isinstance(error, DisagreementError) or _found_by_all()
    if alike and "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("LOCAL_RANK", "0") != "0":
        # torchrun ends all ranks as soon as one rank ends, so the rank that prints must end first.
        time.sleep(10.0)
    rank = "" if alike else f"rank {os.environ.get('RANK', '0')}: "
    for line in str(error).splitlines():
        print(f"wallfacer: error: {rank}{line}", file=sys.stderr, flush=True)


def _record_for_torchrun(error: WallfacerError) -> None:
    """Write the error to the file that torchrun's agent reads for its summary."""
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        text = f"wallfacer: error: {error}"
        # torchrun prints py_callstack instead of the message if there is one.
        extra = {"py_callstack": text, "timestamp": str(int(time.time()))}
        with contextlib.suppress(OSError):  # the disk may be full, and stderr has the error too
            Path(path).write_text(json.dumps({"message": {"message": text, "extraInfo": extra}}))


def _found_by_all() -> bool:
    """Return whether this is a torchrun job without process groups. Its ranks most likely have the same error."""
    distributed = sys.modules.get("torch.distributed")
    return "TORCHELASTIC_RUN_ID" in os.environ and not (distributed and distributed.is_initialized())
