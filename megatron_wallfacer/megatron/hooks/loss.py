"""Compute mean losses over the unmasked tokens of the whole context-parallel group."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

from megatron_wallfacer.megatron.hook import Hook
from megatron_wallfacer.megatron.loss import LossFunction, mean_over_group, report_of_group
from megatron_wallfacer.megatron.plugin_state import PluginState
from megatron_wallfacer.megatron.releases import FIRST_LAUNCHED


def loss_hook(state: PluginState) -> Hook:
    """Return the hook of the function that calls a script's loss function in every pipeline schedule."""

    def corrected(loss_func: LossFunction, config: Any) -> LossFunction:
        from megatron.core import parallel_state

        group = parallel_state.get_context_parallel_group()
        if group.size() == 1:
            return loss_func
        # With per-token loss Megatron itself sums token counts over all ranks once per step.
        if not config.calculate_per_token_loss:
            loss_func = mean_over_group(loss_func, group)
        if getattr(state.args, "sft", False) and not torch.is_grad_enabled():
            loss_func = report_of_group(loss_func, group)
        return loss_func

    def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(original)

        def forward_step_calc_loss(*args: Any, **kwargs: Any) -> Any:
            call = signature.bind(*args, **kwargs)
            values = call.arguments
            if values["loss_func"] is not None and not values["collect_non_loss_data"]:
                values["loss_func"] = corrected(values["loss_func"], values["config"])
            return original(*call.args, **call.kwargs)

        return forward_step_calc_loss

    return Hook(
        name="mean loss",
        purpose="takes mean losses over the unmasked tokens of the whole context-parallel group",
        target="megatron.core.pipeline_parallel.schedules:forward_step_calc_loss",
        since=FIRST_LAUNCHED,
        parameters=("loss_func", "config", "collect_non_loss_data"),
        wrap=wrap,
    )
