"""Compute the loss and dense MLPs in tiles of tokens: ``--wallfacer-loss-tiles`` and ``--wallfacer-mlp-tiles``."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache, partial
from typing import Any

from megatron_wallfacer.errors import WallfacerError
from megatron_wallfacer.megatron.hook import Hook
from megatron_wallfacer.megatron.loss_tiles import TiledLoss
from megatron_wallfacer.megatron.mlp_tiles import tiled_mlp_forward
from megatron_wallfacer.megatron.plugin_state import PluginState
from megatron_wallfacer.megatron.releases import FIRST_LAUNCHED, OUTPUT_PROCESSOR


def loss_tiles_hook(state: PluginState) -> Hook:
    """Return the hook that adds an output processor to every ``GPTModel.forward`` with labels."""

    def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(original)

        def forward(model: Any, *args: Any, **kwargs: Any) -> Any:
            given = signature.bind(model, *args, **kwargs).arguments
            if given.get("output_processor") is not None:
                raise WallfacerError(
                    "--wallfacer-loss-tiles: must be left out, because the script passes its own output_processor"
                )
            if given.get("labels") is None:
                return original(model, *args, **kwargs)
            return original(model, *args, **kwargs, output_processor=TiledLoss(state.settings.flags.loss_tiles))

        return forward

    return Hook(
        name="loss tiles",
        purpose="computes vocabulary head and loss in tiles of tokens",
        target="megatron.core.models.gpt.gpt_model:GPTModel.forward",
        since=OUTPUT_PROCESSOR,
        parameters=("labels", "output_processor"),
        wrap=wrap,
    )


def mlp_tiles_hook(state: PluginState) -> Hook:
    """Return the hook that makes ``MLP.forward`` compute tiles of tokens."""

    def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
        tiled = cache(partial(tiled_mlp_forward, original))

        def forward(mlp: Any, *args: Any, **kwargs: Any) -> Any:
            return tiled(state.settings.flags.mlp_tiles)(mlp, *args, **kwargs)

        return forward

    return Hook(
        name="MLP tiles",
        purpose="computes dense MLPs in tiles of tokens",
        target="megatron.core.transformer.mlp:MLP.forward",
        since=FIRST_LAUNCHED,
        parameters=("hidden_states", "per_token_scale"),
        wrap=wrap,
    )
