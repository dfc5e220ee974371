"""Load checkpoints of Megatron's distributed optimizer if weights are in fp32 and Adam is torch's.

This module replaces nothing if Megatron uses the Adam of TransformerEngine or Apex. With torch's Adam and weights in
fp32, three parts of `DistributedOptimizer` (megatron/core/optimizer/distrib_optimizer.py) fail:

* Megatron calls `state_dict` before it loads a checkpoint, to find out what to read. `state_dict` reads Adam's step
  from the parameters' state, which does not exist before the first step, so an assertion fails. This module creates
  Adam's state before `state_dict` reads it.
* `load_state_dict` copies the loaded weights into the optimizer's fp32 copy or, if there is no such copy, into the
  model's weights. Torch forbids such a copy while gradients are recorded, so this module turns the recording off.
* After `load_state_dict` all parameters share one step tensor, so Adam would increase the step once per parameter.
  `load_state_dict` also replaces Adam's step from the checkpoint by the earlier step. This module sets the step of each
  parameter to the step in the checkpoint.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from megatron_wallfacer.megatron.replace import wrap


def install() -> None:
    """Wrap `state_dict` and `load_state_dict` if Megatron uses torch's Adam."""
    from megatron.core.optimizer import distrib_optimizer

    if distrib_optimizer.HAVE_APEX_OR_TE:
        return
    wrap("megatron.core.optimizer.distrib_optimizer:DistributedOptimizer.state_dict", _with_state)
    wrap("megatron.core.optimizer.distrib_optimizer:DistributedOptimizer.load_state_dict", _each_its_step)


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
