"""Install the plugin's features into Megatron through hooks: one module per replaced function, listed in `registry`.

The hooks ``arguments`` and ``start`` are always installed. The hook ``arguments`` installs the other hooks if
``--wallfacer-cp-size`` is given, so attention is Megatron's own without the flag. The packages `any_device` and
`cpu_runtime` supply functions that Megatron lacks if a library is missing.
"""

from megatron_wallfacer.megatron.hooks.registry import Hooks

__all__ = ["Hooks"]
