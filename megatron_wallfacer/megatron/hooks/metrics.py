"""Log metrics of attention after Megatron logs a training step: ``--wallfacer-log-metrics``."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

from megatron_wallfacer.megatron.hook import Hook
from megatron_wallfacer.megatron.metrics import log_step
from megatron_wallfacer.megatron.outputs import Output
from megatron_wallfacer.megatron.plugin_state import PluginState
from megatron_wallfacer.megatron.releases import FIRST_HOOKED


def metrics_hook(state: PluginState) -> Hook:
    """Return the hook of ``training_log``, which runs once per training step on every rank."""

    def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
        # The position of the argument iteration differs between releases.
        signature = inspect.signature(original)
        output = Output("--wallfacer-log-metrics")

        def training_log(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            if state.sums is not None:
                iteration = signature.bind(*args, **kwargs).arguments["iteration"]
                write = partial(log_step, state.sums, iteration, state.args.tensorboard_log_interval)
                output.write(write)
            return result

        return training_log

    return Hook(
        name="training log",
        purpose="adds metrics of attention to the log of Megatron",
        target="megatron.training.training:training_log",
        since=FIRST_HOOKED,
        parameters=("iteration",),
        wrap=wrap,
    )
