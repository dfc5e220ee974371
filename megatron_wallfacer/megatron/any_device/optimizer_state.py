"""Resuming with the distributed optimizer in fp32 and with torch's Adam.

Megatron takes the Adam of TransformerEngine or Apex where one of them is installed; then nothing is replaced. With
torch's, and the weights in fp32, three things of `DistributedOptimizer` (megatron/core/optimizer/distrib_optimizer.py)
do not work:

* Before a checkpoint is loaded Megatron asks for the state, to know what to read. `state_dict` takes Adam's step from
  the parameters' state, and before the first step there is none: an assertion fails. Here the state is made first.
* `load_state_dict` copies into the fp32 copy of the weights, or, where there is no copy, into the weights themselves:
  in-place, which torch allows where no gradient is recorded.
* It gives one tensor to all parameters as their step, which would count parameters instead of steps, and then
  overwrites it with what the state had before the checkpoint was read. Here each gets its own, from the checkpoint.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from megatron_wallfacer.megatron.replace import wrap


def install() -> None:
    """Wrap both methods, where Megatron has torch's Adam."""
    from megatron.core.optimizer import distrib_optimizer

    if distrib_optimizer.HAVE_APEX_OR_TE:
        return
    wrap("megatron.core.optimizer.distrib_optimizer.DistributedOptimizer.state_dict", _with_state)
    wrap("megatron.core.optimizer.distrib_optimizer.DistributedOptimizer.load_state_dict", _each_its_step)


def _with_state(original: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    @functools.wraps(original)
    def state_dict(self: Any) -> dict[str, Any]:
        adam = self.optimizer
        if not adam.state:
            self.init_state_fn(adam, self.config)
            for state in adam.state.values():
                state.setdefault("step", torch.zeros(()))
        return original(self)

    return state_dict


def _each_its_step(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def load_state_dict(self: Any, state_dict: dict[str, Any]) -> None:
        step = float(state_dict["optimizer"]["param_groups"][0]["step"])
        with torch.no_grad():
            original(self, state_dict)
        for state in self.optimizer.state.values():
            state["step"] = torch.tensor(step)

    return load_state_dict
