"""Install the plugin's features into Megatron through hooks: one module per replaced function, listed in `registry`.

The hooks ``arguments`` and ``start`` are always installed. The hook ``arguments`` installs the other hooks if
``--wallfacer-cp-size`` is given. Without this flag, Megatron's own attention runs. The packages `any_device` and
`cpu_runtime` replace parts of Megatron that fail without TransformerEngine, Apex or CUDA.
"""

from megatron_wallfacer.megatron.hooks.registry import Hooks

__all__ = ["Hooks"]
