"""Log metrics of attention after Megatron logs a training step: ``--wallfacer-log-metrics``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from megatron_wallfacer.megatron.hook import Hook, bound
from megatron_wallfacer.megatron.metrics import log_step
from megatron_wallfacer.megatron.plugin_state import PluginState
from megatron_wallfacer.megatron.releases import FIRST_HOOKED


@partial(
    Hook,
    name="training log",
    purpose="adds metrics of attention to the log of Megatron",
    target="megatron.training.training:training_log",
    since=FIRST_HOOKED,
    parameters=("iteration",),
)
def metrics_hook(state: PluginState, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Write the metrics of a training step. Megatron calls the function once per training step on every rank."""
    result = original(*args, **kwargs)
    if state.sums is not None:
        # The position of the argument differs between releases.
        iteration = bound(original, *args, **kwargs).arguments["iteration"]
        state.log_output.write(partial(log_step, state.sums, iteration, state.args.tensorboard_log_interval))
    return result
