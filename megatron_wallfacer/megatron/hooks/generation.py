"""Stop text generation with a cache of keys and values, which the plugin does not support."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from megatron_wallfacer.errors import WallfacerError
from megatron_wallfacer.megatron.core_attention import WallfacerCoreAttention
from megatron_wallfacer.megatron.hook import Hook
from megatron_wallfacer.megatron.plugin_state import PluginState
from megatron_wallfacer.megatron.releases import FIRST_LAUNCHED


def generation_hook(state: PluginState) -> Hook:
    """Return the hook of the function that adds keys and values to Megatron's cache before attention.

    The cache contains only the tokens of one rank, not of its context-parallel group, so attention would be wrong.
    """

    def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(original)

        def _adjust_key_value_for_inference(layer: Any, *args: Any, **kwargs: Any) -> Any:
            context = signature.bind(layer, *args, **kwargs).arguments["inference_context"]
            ours = isinstance(layer.core_attention, WallfacerCoreAttention)
            if context is not None and ours:
                raise WallfacerError(
                    f"layer {layer.layer_number}: --wallfacer-cp-size {state.settings.flags.cp_size}: must be left "
                    "out to generate with a cache of keys and values, because only Megatron's own attention supports it"
                )
            return original(layer, *args, **kwargs)

        return _adjust_key_value_for_inference

    return Hook(
        name="generation",
        purpose="stops generation with a cache of keys and values before the first token",
        target="megatron.core.transformer.attention:Attention._adjust_key_value_for_inference",
        since=FIRST_LAUNCHED,
        parameters=("inference_context",),
        wrap=wrap,
    )
