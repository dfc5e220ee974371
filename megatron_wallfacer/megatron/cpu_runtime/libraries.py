"""TransformerEngine and Apex have no kernels for the CPU: Megatron must not find them.

Megatron takes what it finds, whatever `--transformer-impl` says: the final norm, Adam, the multi-tensor functions, the
tracker of random states, FP8's types. On CPU tensors they raise. In a container on a login node both libraries can be
imported and there is no GPU, so here their names are taken out of the import system. Megatron then runs as in an
environment without them, which is the one that the tests train in.
"""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType

from megatron_wallfacer.errors import WallfacerError

HIDDEN = ("transformer_engine", "transformer_engine_torch", "apex")

_before: dict[str, ModuleType] = {}


def install() -> None:
    """Make `import transformer_engine` and `import apex` fail in this process, as if they were not installed.

    Raises:
        WallfacerError: Megatron was imported before and has them already.
    """
    bound = sys.modules.get("megatron.core.extensions.transformer_engine")
    if getattr(bound, "HAVE_TE", False):
        raise WallfacerError(
            "megatron.core was imported before the plugin and uses TransformerEngine, which does not run on the CPU: "
            "import megatron_wallfacer.auto before Megatron"
        )
    hidden = [name for name in HIDDEN if name in sys.modules or importlib.util.find_spec(name) is not None]
    for name in [name for name, module in sys.modules.items() if module and name.partition(".")[0] in hidden]:
        _before[name] = sys.modules.pop(name)
    # Python's own mark of a module that must not be imported: ModuleNotFoundError, of its submodules, too.
    sys.modules.update(dict.fromkeys(hidden))


def uninstall() -> None:
    """Let them be imported again; what had been imported before `install` is back."""
    for name in HIDDEN:
        if name in sys.modules and sys.modules[name] is None:
            del sys.modules[name]
    sys.modules.update(_before)
    _before.clear()
