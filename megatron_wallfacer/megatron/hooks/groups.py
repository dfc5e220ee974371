"""H2: axis groups, made when Megatron makes its own, dropped when it drops them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from megatron_wallfacer.megatron.hook import Hook
from megatron_wallfacer.megatron.plugin_state import PluginState
from megatron_wallfacer.megatron.releases import FIRST_HOOKED
from megatron_wallfacer.megatron.startup_report import startup_report
from megatron_wallfacer.megatron.unsupported import check_supported


def groups_hooks(state: PluginState) -> tuple[Hook, Hook]:
    """One hook for making, one for dropping."""

    def wrap_initialize(original: Callable[..., None]) -> Callable[..., None]:
        # Signatures differ between versions, so nothing is read from the arguments: the groups are there afterwards.
        def initialize_model_parallel(*args: Any, **kwargs: Any) -> None:
            from megatron.core import parallel_state

            # Again, now that checkpoint arguments and Megatron's own validation have had their say.
            check_supported(state.args)
            original(*args, **kwargs)
            state.connect(parallel_state.get_context_parallel_group())
            if dist.get_rank() == 0:
                print(startup_report(state), flush=True)

        return initialize_model_parallel

    def wrap_destroy(original: Callable[..., None]) -> Callable[..., None]:
        def destroy_model_parallel(*args: Any, **kwargs: Any) -> None:
            state.disconnect()
            original(*args, **kwargs)

        return destroy_model_parallel

    make = Hook(
        name="groups",
        purpose="makes the groups of each axis, on every rank in the same order",
        target="megatron.core.parallel_state:initialize_model_parallel",
        since=FIRST_HOOKED,
        parameters=("context_parallel_size",),
        wrap=wrap_initialize,
    )
    drop = Hook(
        name="groups, dropped",
        purpose="destroys the groups of each axis",
        target="megatron.core.parallel_state:destroy_model_parallel",
        since=FIRST_HOOKED,
        parameters=(),
        wrap=wrap_destroy,
    )
    return make, drop
