"""Put the plugin's core attention into Megatron's layers. Stop text generation, which the plugin does not support."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

from megatron_wallfacer.errors import WallfacerError
from megatron_wallfacer.megatron.core_attention import WallfacerCoreAttention, core_attention_class
from megatron_wallfacer.megatron.hook import Hook, bound
from megatron_wallfacer.megatron.plugin_state import PluginState
from megatron_wallfacer.megatron.releases import FIRST_HOOKED, FIRST_LAUNCHED

#: Spec providers, of which Megatron chooses one by --transformer-impl.
_PROVIDERS = {
    "local": "megatron.core.models.backends:LocalSpecProvider",
    "TE": "megatron.core.extensions.transformer_engine_spec_provider:TESpecProvider",
}
_class_of = cache(core_attention_class)


def _core_attention(state: PluginState, original: Callable[..., type], provider: Any) -> type:
    keeps_some = state.is_on and state.settings.layers is not None
    return _class_of(state, original(provider) if keeps_some else None)


core_attention_hooks = tuple(
    Hook(
        _core_attention,
        name=f"core attention, {name}",
        purpose="puts the attention module of the plugin into every layer",
        target=f"{provider}.core_attention",
        since=FIRST_HOOKED,
        parameters=("self",),
    )
    for name, provider in _PROVIDERS.items()
)


@partial(
    Hook,
    name="generation",
    purpose="stops generation with a cache of keys and values before the first token",
    target="megatron.core.transformer.attention:Attention._adjust_key_value_for_inference",
    since=FIRST_LAUNCHED,
    parameters=("inference_context",),
)
def generation_hook(state: PluginState, original: Callable[..., Any], layer: Any, *args: Any, **kwargs: Any) -> Any:
    """Reject a cache of keys and values.

    A rank's cache has only the tokens of that rank, not of the context-parallel group, so attention would be wrong.
    """
    context = bound(original, layer, *args, **kwargs).arguments["inference_context"]
    if context is not None and isinstance(layer.core_attention, WallfacerCoreAttention):
        raise WallfacerError(
            f"layer {layer.layer_number}: --wallfacer-cp-size {state.settings.flags.cp_size}: must be left "
            "out to generate with a cache of keys and values, because only Megatron's own attention supports it"
        )
    return original(layer, *args, **kwargs)
