"""Move inputs of checkpointed layers to host memory: ``--wallfacer-layer-inputs-on-host``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron_wallfacer.megatron.hook import Hook
from megatron_wallfacer.megatron.plugin_state import PluginState
from megatron_wallfacer.megatron.releases import FIRST_LAUNCHED


def layer_inputs_hook(state: PluginState) -> Hook:
    """Return the hook of ``tensor_parallel.checkpoint`` that moves layer inputs."""

    def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
        def checkpoint(function: Callable[..., Any], distribute_saved_activations: bool, *args: Any) -> Any:
            if state.layer_inputs is None:
                return original(function, distribute_saved_activations, *args)
            return state.layer_inputs.checkpoint(original, function, distribute_saved_activations, *args)

        return checkpoint

    return Hook(
        name="layer inputs",
        purpose="moves inputs of checkpointed layers to host memory",
        target="megatron.core.tensor_parallel:checkpoint",
        since=FIRST_LAUNCHED,
        parameters=("function", "distribute_saved_activations"),
        wrap=wrap,
    )
