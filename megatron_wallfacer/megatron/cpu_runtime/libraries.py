"""Hide TransformerEngine and Apex, which have no CPU kernels, from Megatron.

Even with `--transformer-impl local`, Megatron uses TransformerEngine or Apex, if installed, for the final norm, Adam,
random states and more. TransformerEngine and Apex raise errors for CPU tensors. In a container on a login node
TransformerEngine and Apex can be imported although there is no GPU. This module makes the import of TransformerEngine
and Apex fail, as if the libraries were not installed.
"""

from __future__ import annotations

import importlib.util
import sys

from megatron_wallfacer.errors import WallfacerError

HIDDEN = ("transformer_engine", "transformer_engine_torch", "apex")


def install() -> None:
    """Make `import transformer_engine` and `import apex` fail in this process, as if they were not installed.

    Raises:
        WallfacerError: Megatron has already imported TransformerEngine in this process.
    """
    bound = sys.modules.get("megatron.core.extensions.transformer_engine")
    if getattr(bound, "HAVE_TE", False):
        raise WallfacerError(
            "megatron.core was imported before the plugin and uses TransformerEngine, which does not run on the CPU: "
            "import megatron_wallfacer.auto before Megatron"
        )
    hidden = [name for name in HIDDEN if name in sys.modules or importlib.util.find_spec(name) is not None]
    for name in [name for name, module in sys.modules.items() if module and name.partition(".")[0] in hidden]:
        del sys.modules[name]
    # Python raises ModuleNotFoundError for a module that is None in sys.modules, and for its submodules.
    sys.modules.update(dict.fromkeys(hidden))
