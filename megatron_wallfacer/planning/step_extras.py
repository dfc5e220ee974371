"""Seconds that a step pays for less memory: tiles, copies to host memory, Adam on the host. All in closed form."""

from __future__ import annotations

from dataclasses import astuple, dataclass

from megatron_wallfacer.planning.cluster import Cluster
from megatron_wallfacer.planning.inventory import Activations, layers_on_host
from megatron_wallfacer.planning.model import Model
from megatron_wallfacer.planning.parallel import Software, Spread
from megatron_wallfacer.planning.states import WEIGHT, parameters_of_rank

#: Bytes that PyTorch's fused Adam on the CPU reads and writes for a parameter: weight, gradient and two moments read,
#: weight and moments written, in fp32.
_HOST_ADAM_TRAFFIC = 28
#: 1e9 bytes per second of host memory that Adam reaches on a node of two sockets; not measured.
_HOST_ADAM_GBYTE_S = 200.0


@dataclass(frozen=True)
class StepExtras:
    """Seconds of one step of the slowest rank.

    Attributes:
        mlp_s: MLP tiles: each MLP's forward pass once more.
        head_s: loss tiles: the head's forward pass once more.
        rewrites_s: weight gradients that are read and written once per tile, not once.
        copies_s: copies to and from host memory that no kernel hides.
        adam_s: Adam on the host, and gradients and weights over the host link.
    """

    mlp_s: float = 0.0
    head_s: float = 0.0
    rewrites_s: float = 0.0
    copies_s: float = 0.0
    adam_s: float = 0.0

    @property
    def seconds(self) -> float:
        """All of them."""
        return self.mlp_s + self.head_s + self.rewrites_s + self.copies_s + self.adam_s

    def times(self, slots: int) -> StepExtras:
        """Return the seconds of so many micro-batches one after the other."""
        return StepExtras(*(slots * seconds for seconds in astuple(self)))


def tile_extras(model: Model, cluster: Cluster, tokens: int, spread: Spread, software: Software) -> StepExtras:
    """Return what tiles cost, for one micro-batch of one stage.

    Args:
        model: that is trained.
        cluster: its device.
        tokens: tokens per context-parallel rank.
        spread: sizes of the groups.
        software: the tiles.
    """
    device, layers = cluster.device, model.layers // spread.pp
    rate = device.tflops * 1e12 * device.matmul
    memory = (device.memory_gbyte_s or float("inf")) * 1e9
    share = tokens / spread.tp
    mlp_s = head_s = rewritten = 0.0
    if software.mlp_tiles > 1:
        touched = WEIGHT * model.top_k * model.ffn_hidden * (3 if model.swiglu else 2)
        flops = 2.0 * model.top_k * model.expert_parameters
        mlp_s = layers * share * (flops / rate + touched / memory)
        rewritten += (software.mlp_tiles - 1) * layers * model.experts * model.expert_parameters / spread.tp
    if software.loss_tiles > 1:
        head_s = share * model.head_flops() / rate
        rewritten += (software.loss_tiles - 1) * model.vocabulary * model.hidden / spread.tp
    return StepExtras(mlp_s, head_s, 2 * software.gradient_bytes * rewritten / memory)


def exposed_copies_s(work: Activations, cluster: Cluster, forward_s: float, backward_s: float) -> float:
    """Return the seconds of copies that are longer than the layer behind whose kernels they run, all layers.

    Args:
        work: the micro-batch.
        cluster: its host link.
        forward_s, backward_s: seconds of one layer's passes.
    """
    if not work.host_bytes or cluster.host_link is None:
        return 0.0
    exposed = 0.0
    both = (layers_on_host(work.layers, work.outputs_on_host), layers_on_host(work.layers, work.inputs_on_host))
    for layer in range(max(both)):
        nbytes = work.kept_output * (layer < both[0]) + work.hidden * (layer < both[1])
        copy_s = nbytes / (cluster.host_link * 1e9)
        exposed += max(0.0, copy_s - forward_s) + max(0.0, copy_s - backward_s)
    return exposed


def host_adam_s(model: Model, cluster: Cluster, spread: Spread, software: Software) -> float:
    """Return the seconds of a step's Adam on the host, once per step. No part of it is hidden."""
    if software.adam != "host" or cluster.host_link is None:
        return 0.0
    parameters = parameters_of_rank(model, spread) / (spread.dp * spread.cp)
    moved_s = parameters * (software.gradient_bytes + WEIGHT) / (cluster.host_link * 1e9)
    return moved_s + cluster.gpus_per_node * parameters * _HOST_ADAM_TRAFFIC / (_HOST_ADAM_GBYTE_S * 1e9)
