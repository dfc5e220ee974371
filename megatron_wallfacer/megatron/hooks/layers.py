"""Compare the layers of all ranks after the model is built, and check that the plugin computes the attention layers."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import Any

import torch.distributed as dist

from megatron_wallfacer.megatron.agreement.layers import check_model, name_mtp_layers
from megatron_wallfacer.megatron.communicators import gathered
from megatron_wallfacer.megatron.hook import Hook
from megatron_wallfacer.megatron.host_memory.prepare import prepare_host_memory
from megatron_wallfacer.megatron.layers import advice_of_the_plugin, check_layers, count_layers
from megatron_wallfacer.megatron.plugin_state import PluginState
from megatron_wallfacer.megatron.releases import FIRST_HOOKED


@partial(
    Hook,
    name="layer count",
    purpose="compares the layers of all ranks, and prints N of N attention layers or stops",
    target="megatron.training.training:setup_model_and_optimizer",
    since=FIRST_HOOKED,
    parameters=("model_type",),
)
def layers_hook(state: PluginState, original: Callable[..., tuple[Any, ...]], *args: Any, **kwargs: Any) -> Any:
    """Check that every hook is still in place, build the model, and check the model's layers."""
    from megatron.core import parallel_state

    for hook in state.hooks:
        hook.verify(state.version)
    with advice_of_the_plugin():
        result = original(*args, **kwargs)
    state.models += 1
    name_mtp_layers(result[0])
    timeout = timedelta(minutes=state.args.distributed_timeout_minutes)
    # This precedes the first collective, because ranks that disagree may wait in different collectives.
    check_model(result[0], parallel_state.get_context_parallel_group(), timeout, state.models)
    # All ranks reach this point. In a forward pass pipeline stages would wait for each other.
    counts = gathered(count_layers(result[0]))
    pipelines = dist.get_world_size() // parallel_state.get_pipeline_model_parallel_world_size()
    lines = [check_layers(counts, pipelines), prepare_host_memory(state, result[0])]
    if dist.get_rank() == 0:
        print("\n".join(filter(None, lines)), flush=True)
    return result
