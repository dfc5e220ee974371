"""Make and destroy the axis groups when Megatron makes and destroys its own groups."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch.distributed as dist

from megatron_wallfacer.megatron.hook import Hook
from megatron_wallfacer.megatron.plugin_state import PluginState
from megatron_wallfacer.megatron.releases import FIRST_HOOKED
from megatron_wallfacer.megatron.startup_report import startup_report
from megatron_wallfacer.megatron.unsupported import check_supported


@partial(
    Hook,
    name="groups",
    purpose="makes the groups of each axis, on every rank in the same order",
    target="megatron.core.parallel_state:initialize_model_parallel",
    since=FIRST_HOOKED,
    parameters=("context_parallel_size",),
)
def groups_hook(state: PluginState, original: Callable[..., None], *args: Any, **kwargs: Any) -> None:
    """Make the process groups of all axes once Megatron has made its own groups, and print the startup report."""
    from megatron.core import parallel_state

    # Check again, because arguments from a checkpoint and Megatron's validation can change the arguments.
    check_supported(state.args)
    original(*args, **kwargs)
    # Signatures differ between releases, so the hook reads Megatron's groups instead of the arguments.
    state.connect(parallel_state.get_context_parallel_group())
    if dist.get_rank() == 0:
        print(startup_report(state), flush=True)


@partial(
    Hook,
    name="groups, dropped",
    purpose="destroys the groups of each axis",
    target="megatron.core.parallel_state:destroy_model_parallel",
    since=FIRST_HOOKED,
)
def dropped_groups_hook(state: PluginState, original: Callable[..., None], *args: Any, **kwargs: Any) -> None:
    """Destroy the axis groups before Megatron's groups."""
    state.disconnect()
    original(*args, **kwargs)
