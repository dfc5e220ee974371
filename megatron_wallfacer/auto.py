"""Activate the plugin at import, for users who start `torchrun pretrain_gpt.py` without this package's launcher.

    import megatron_wallfacer.auto  # first of all, before torch and Megatron

The import has the effect of the launcher `python -m megatron_wallfacer`: it prepares the device, `sys.argv` and the
hooks. `scripts/apply_patch.sh` writes the import into a Megatron checkout.
"""

from __future__ import annotations

import sys
from types import TracebackType

from megatron_wallfacer.errors import WallfacerError
from megatron_wallfacer.megatron import launcher
from megatron_wallfacer.megatron.version import check_supported, megatron_version


def activate() -> None:
    """Prepare the device, complete `sys.argv` and install the hooks, unless the launcher has installed them already.

    Raises:
        SystemExit: A setting is not supported. The exit code is 2, and stderr gets one line.
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
    # Megatron's parser raises an error if the plugin's flags are added twice.
    megatron = sys.modules.get("megatron.training.arguments")
    function = getattr(megatron, "add_megatron_arguments", None)
    return getattr(function, "__globals__", {}).get("__name__") == "megatron_wallfacer.megatron.hook"


def _report_in_one_line() -> None:
    # The launcher catches errors around the script. Here the script is the main module, so a hook catches them.
    before = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if not isinstance(error, WallfacerError):
            before(kind, error, trace)
            return
        launcher._report(error)
        sys.exit(2)

    sys.excepthook = hook


activate()
