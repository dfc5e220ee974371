"""H4: once the model is built, ranks compare their layers, and every attention layer must be the plugin's."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from megatron_wallfacer.megatron.agreement.layers import check_model, name_mtp_layers
from megatron_wallfacer.megatron.hook import Hook
from megatron_wallfacer.megatron.host_memory.prepare import prepare_host_memory
from megatron_wallfacer.megatron.layers import advice_of_the_plugin, check_layers, count_layers, gather_counts
from megatron_wallfacer.megatron.plugin_state import PluginState
from megatron_wallfacer.megatron.releases import FIRST_HOOKED


def layers_hook(state: PluginState, verify: Callable[[], None]) -> Hook:
    """``verify`` checks that the other hooks are still in place."""

    def wrap(original: Callable[..., tuple[Any, ...]]) -> Callable[..., tuple[Any, ...]]:
        def setup_model_and_optimizer(*args: Any, **kwargs: Any) -> tuple[Any, ...]:
            from megatron.core import parallel_state

            verify()
            with advice_of_the_plugin():
                result = original(*args, **kwargs)
            state.models += 1
            name_mtp_layers(result[0])
            timeout = timedelta(minutes=state.args.distributed_timeout_minutes)
            # Before the first collective: ranks that disagree may wait in different ones.
            check_model(result[0], parallel_state.get_context_parallel_group(), timeout, state.models)
            # Outside a forward pass, where pipeline stages would wait for each other: every rank is here now.
            counts = gather_counts(count_layers(result[0]))
            pipelines = dist.get_world_size() // parallel_state.get_pipeline_model_parallel_world_size()
            lines = [check_layers(counts, pipelines), prepare_host_memory(state, result[0])]
            if dist.get_rank() == 0:
                print("\n".join(filter(None, lines)), flush=True)
            return result

        return setup_model_and_optimizer

    return Hook(
        name="layer count",
        purpose="compares the layers of all ranks, and prints N of N attention layers or stops",
        target="megatron.training.training:setup_model_and_optimizer",
        since=FIRST_HOOKED,
        parameters=("model_type",),
        wrap=wrap,
    )
