"""The hooks: the only places where the plugin touches Megatron.

=================  ==========================================================  ==============================
hook               target                                                      why
=================  ==========================================================  ==============================
arguments          ``megatron.training.arguments.add_megatron_arguments``      our flags; checks after parsing
groups             ``megatron.core.parallel_state.initialize_model_parallel``  axis groups, on every rank
groups, dropped    ``megatron.core.parallel_state.destroy_model_parallel``     drops them
core attention     ``core_attention`` of the local and the TE spec provider    our module in every layer
layer count        ``megatron.training.training.setup_model_and_optimizer``    N of N, before the first step
=================  ==========================================================  ==============================

The arguments hook is always in; it installs the others when ``--wallfacer-cp-size`` is given, so that without
the flag Megatron runs as it is.
"""

from megatron_wallfacer.megatron.hooks.arguments import arguments_hook
from megatron_wallfacer.megatron.hooks.core_attention import core_attention_hooks
from megatron_wallfacer.megatron.hooks.groups import groups_hooks
from megatron_wallfacer.megatron.hooks.layers import layers_hook
from megatron_wallfacer.megatron.hooks.registry import Hooks

__all__ = ["Hooks", "arguments_hook", "core_attention_hooks", "groups_hooks", "layers_hook"]
