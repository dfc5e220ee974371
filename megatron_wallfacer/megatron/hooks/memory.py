"""Hooks that save memory. They compute the loss and dense MLPs in token tiles, and move layer inputs to the host."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from megatron_wallfacer.errors import WallfacerError
from megatron_wallfacer.megatron.hook import Hook, bound
from megatron_wallfacer.megatron.loss_tiles import tiled_loss
from megatron_wallfacer.megatron.plugin_state import PluginState
from megatron_wallfacer.megatron.releases import FIRST_LAUNCHED, OUTPUT_PROCESSOR
from megatron_wallfacer.megatron.token_tiles import tiled_mlp_forward


@partial(
    Hook,
    name="loss tiles",
    purpose="computes vocabulary head and loss in tiles of tokens",
    target="megatron.core.models.gpt.gpt_model:GPTModel.forward",
    since=OUTPUT_PROCESSOR,
    parameters=("labels", "output_processor"),
)
def loss_tiles_hook(state: PluginState, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Compute the head and the loss in tiles if the call has labels: ``--wallfacer-loss-tiles``."""
    given = bound(original, *args, **kwargs).arguments
    if given.get("output_processor") is not None:
        raise WallfacerError(
            "--wallfacer-loss-tiles: must be left out, because the script passes its own output_processor"
        )
    if given.get("labels") is None:
        return original(*args, **kwargs)
    return original(*args, **kwargs, output_processor=partial(tiled_loss, state.settings.flags.loss_tiles))


@partial(
    Hook,
    name="MLP tiles",
    purpose="computes dense MLPs in tiles of tokens",
    target="megatron.core.transformer.mlp:MLP.forward",
    since=FIRST_LAUNCHED,
    parameters=("hidden_states", "per_token_scale"),
)
def mlp_tiles_hook(state: PluginState, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Compute an MLP in tiles: ``--wallfacer-mlp-tiles``."""
    return tiled_mlp_forward(original, state.settings.flags.mlp_tiles)(*args, **kwargs)


@partial(
    Hook,
    name="layer inputs",
    purpose="moves inputs of checkpointed layers to host memory",
    target="megatron.core.tensor_parallel:checkpoint",
    since=FIRST_LAUNCHED,
    parameters=("function", "distribute_saved_activations"),
)
def layer_inputs_hook(
    state: PluginState,
    original: Callable[..., Any],
    function: Callable[..., Any],
    distribute_saved_activations: bool,
    *args: Any,
) -> Any:
    """Move inputs of recomputed layers to host memory: ``--wallfacer-layer-inputs-on-host``."""
    run = original if state.layer_inputs is None else partial(state.layer_inputs.checkpoint, original)
    return run(function, distribute_saved_activations, *args)
