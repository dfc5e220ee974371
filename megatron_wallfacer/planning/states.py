"""Parameters of a rank and their states: weights, gradients, and what Adam keeps."""

from __future__ import annotations

from megatron_wallfacer.planning.inventory import Buffer
from megatron_wallfacer.planning.model import Model
from megatron_wallfacer.planning.parallel import Adam, Software, Spread

#: Bytes of a parameter: its bf16 weight; Adam's states on the device (an fp32 weight, or 16 bits that complete the bf16
#: one, and two fp32 moments).
WEIGHT = 2
ADAM: dict[Adam, int] = {"device": 12, "precision-aware": 10, "host": 0}
#: Bytes of a parameter in host memory with ``--optimizer-cpu-offload``: fp32 weight, gradient and two moments.
HOST_ADAM = 16


def parameters_of_rank(model: Model, spread: Spread) -> float:
    """Of the fullest stage; embedding and LM head are on different ones, if there are several."""
    layers = model.layers * model.layer_parameters / spread.pp
    return (layers + model.vocabulary_parameters / (1 if spread.pp == 1 or model.tied else 2)) / spread.tp


def state_buffers(model: Model, spread: Spread, software: Software) -> tuple[Buffer, ...]:
    """Return weights, gradients and Adam's states of one rank. They are live at every moment."""
    parameters, ranks = parameters_of_rank(model, spread), spread.dp * spread.cp
    adam = parameters * ADAM[software.adam] / ranks
    if software.states == "zero-2":
        gradients = Buffer("gradients", parameters * WEIGHT / ranks)
    else:
        flag = "--grad-reduce-in-bf16" if software.gradient_bytes > WEIGHT else ""
        gradients = Buffer("gradient buffer", parameters * software.gradient_bytes, smaller_by=flag)
    flag = "--optimizer-cpu-offload" if adam else ""
    return Buffer("weights", parameters * WEIGHT), gradients, Buffer("Adam's states", adam, smaller_by=flag)


def host_state_bytes(model: Model, spread: Spread, software: Software) -> float:
    """Return the bytes of host memory that one rank's optimizer takes."""
    if software.adam != "host":
        return 0.0
    return HOST_ADAM * parameters_of_rank(model, spread) / (spread.dp * spread.cp)
