"""Make Megatron's spec providers return the plugin's core attention class."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron_wallfacer.megatron.core_attention import core_attention_class
from megatron_wallfacer.megatron.hook import Hook
from megatron_wallfacer.megatron.plugin_state import PluginState
from megatron_wallfacer.megatron.releases import FIRST_HOOKED

PROVIDERS = {
    "local": "megatron.core.models.backends:LocalSpecProvider.core_attention",
    "TE": "megatron.core.extensions.transformer_engine_spec_provider:TESpecProvider.core_attention",
}


def core_attention_hooks(state: PluginState) -> tuple[Hook, ...]:
    """Return one hook for each spec provider. Megatron chooses the provider by --transformer-impl."""
    ours = core_attention_class(state)

    def wrap(original: Callable[..., type]) -> Callable[..., type]:
        def core_attention(provider: Any) -> type:
            if not state.is_on or state.settings.layers is None:
                return ours
            return core_attention_class(state, theirs=original(provider))

        return core_attention

    return tuple(
        Hook(
            name=f"core attention, {name}",
            purpose="puts the attention module of the plugin into every layer",
            target=target,
            since=FIRST_HOOKED,
            parameters=("self",),
            wrap=wrap,
        )
        for name, target in PROVIDERS.items()
    )
