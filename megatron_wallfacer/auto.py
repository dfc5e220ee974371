"""Import it, and the plugin is in: for people who type `torchrun pretrain_gpt.py` itself.

    import megatron_wallfacer.auto  # first of all, before torch and Megatron

What `python -m megatron_wallfacer pretrain_gpt.py` does before it runs the script happens at this import, in the
script's own process and on its own command line; `scripts/apply_patch.sh` writes the line into a checkout.
"""

from __future__ import annotations

import sys
from types import TracebackType

from megatron_wallfacer.errors import WallfacerError
from megatron_wallfacer.megatron import launcher
from megatron_wallfacer.megatron.version import check_supported, megatron_version


def activate() -> None:
    """Prepare the device, complete `sys.argv` for it and install the hooks; nothing where the launcher has done so.

    Raises:
        SystemExit: with 2, after one line on stderr, for a request that cannot be met.
    """
    if _is_in():
        return
    _report_in_one_line()
    try:
        version = megatron_version()
        check_supported(version)
        device, arguments = launcher._choose_device(sys.argv[1:])
        sys.argv = [sys.argv[0], *arguments]
        launcher._install_hooks(version, device)
    except WallfacerError as error:
        launcher._report(error)
        sys.exit(2)


def _is_in() -> bool:
    """Whether the plugin's flags are in Megatron's parser already; they cannot be there twice."""
    megatron = sys.modules.get("megatron.training.arguments")
    function = getattr(megatron, "add_megatron_arguments", None)
    return getattr(function, "__globals__", {}).get("__name__") == "megatron_wallfacer.megatron.hooks.arguments"


def _report_in_one_line() -> None:
    """What the launcher catches around the script is caught here where it leaves it: one line, exit code 2."""
    before = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if not isinstance(error, WallfacerError):
            before(kind, error, trace)
            return
        launcher._report(error)
        sys.exit(2)

    sys.excepthook = hook


activate()
