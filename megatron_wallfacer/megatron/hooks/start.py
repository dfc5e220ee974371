"""Compare the settings of all ranks before torch.distributed and Megatron make process groups."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch.distributed as dist

from megatron_wallfacer.megatron.agreement.start import check_start, takes_part
from megatron_wallfacer.megatron.hook import Hook, bound
from megatron_wallfacer.megatron.plugin_state import PluginState
from megatron_wallfacer.megatron.releases import FIRST_HOOKED


@partial(
    Hook,
    name="start",
    purpose="compares the settings of all ranks before Megatron creates groups",
    target="megatron.training.initialize:_initialize_distributed",
    since=FIRST_HOOKED,
    parameters=("store",),
)
def start_hook(state: PluginState, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Compare the settings of all ranks, also of ranks without ``--wallfacer-cp-size``. Errors name such ranks."""
    store = bound(original, *args, **kwargs).arguments["store"]
    if dist.is_initialized():
        store = dist.distributed_c10d._get_default_store()
    if state.parsed is not None and takes_part():
        settings = state.settings if state.is_on else None
        state.store = check_start(state.parsed, settings, state.version, store)
    return original(*args, **kwargs)
