"""Make and destroy the axis groups when Megatron makes and destroys its own groups."""

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
    """Return one hook that makes the axis groups and one hook that destroys them."""

    def wrap_initialize(original: Callable[..., None]) -> Callable[..., None]:
        # Signatures differ between releases, so the wrapper reads Megatron's groups instead of the arguments.
        def initialize_model_parallel(*args: Any, **kwargs: Any) -> None:
            from megatron.core import parallel_state

            # Check again, because arguments from a checkpoint and Megatron's validation can change the arguments.
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
