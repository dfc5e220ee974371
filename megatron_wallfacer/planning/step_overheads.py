"""Formulas of the time that memory-saving options cost in a step: tiles, copies to host memory, Adam on the host."""

from __future__ import annotations

from dataclasses import astuple, dataclass

from megatron_wallfacer.planning.cluster import Cluster
from megatron_wallfacer.planning.inventory import Activations, layers_on_host
from megatron_wallfacer.planning.model import Model
from megatron_wallfacer.planning.rank_memory import WEIGHT, parameters_of_rank
from megatron_wallfacer.planning.training_options import ParallelSizes, TrainingOptions

#: Bytes per parameter that PyTorch's fused Adam on the CPU moves. It reads weight, gradient and two moments, and writes
#: weight and moments, in fp32.
_HOST_ADAM_TRAFFIC = 28
#: Assumed rate of host memory for Adam on a node of two sockets, in 1e9 bytes per second. The rate was not measured.
_HOST_ADAM_GBYTE_S = 200.0


@dataclass(frozen=True)
class StepOverheads:
    """Seconds that memory-saving options cost in one step, on the slowest rank.

    Attributes:
        mlp_s: seconds of a second forward pass of each MLP, which ``--wallfacer-mlp-tiles`` causes.
        head_s: seconds of a second forward pass of the LM head, which ``--wallfacer-loss-tiles`` causes.
        rewrites_s: seconds to add the weight gradients of the token tiles.
        copies_s: seconds of copies to and from host memory that no kernel overlaps.
        adam_s: seconds of Adam on the host, and of copying gradients and weights over the host link.
    """

    mlp_s: float = 0.0
    head_s: float = 0.0
    rewrites_s: float = 0.0
    copies_s: float = 0.0
    adam_s: float = 0.0

    @property
    def seconds(self) -> float:
        """Return the sum of all overheads in seconds."""
        return self.mlp_s + self.head_s + self.rewrites_s + self.copies_s + self.adam_s

    def times(self, slots: int) -> StepOverheads:
        """Return all overheads multiplied by ``slots``, the number of micro-batches and pipeline bubbles of a step."""
        return StepOverheads(*(slots * seconds for seconds in astuple(self)))


def tile_overheads(
    model: Model, cluster: Cluster, tokens: int, sizes: ParallelSizes, options: TrainingOptions
) -> StepOverheads:
    """Return the overheads of tiles for one micro-batch of one pipeline stage, whose ranks have ``tokens`` tokens."""
    device, layers = cluster.device, model.layers // sizes.pp
    rate = device.tflops * 1e12 * device.matmul
    memory = (device.memory_gbyte_s or float("inf")) * 1e9
    share = tokens / sizes.tp
    mlp_s = head_s = rewritten = 0.0
    if options.mlp_tiles > 1:
        touched = WEIGHT * model.top_k * model.ffn_hidden * (3 if model.swiglu else 2)
        mlp_s = layers * share * (model.mlp_flops() / rate + touched / memory)
        rewritten += (options.mlp_tiles - 1) * layers * model.experts * model.expert_parameters / sizes.tp
    if options.loss_tiles > 1:
        head_s = share * model.head_flops() / rate
        rewritten += (options.loss_tiles - 1) * model.vocabulary * model.hidden / sizes.tp
    return StepOverheads(mlp_s, head_s, 2 * options.gradient_bytes * rewritten / memory)


def exposed_copies_s(work: Activations, cluster: Cluster, forward_s: float, backward_s: float) -> float:
    """Return the seconds by which copies take longer than the layers that overlap them, summed over all layers.

    ``forward_s`` and ``backward_s`` are the seconds of the passes of one layer.
    """
    if not work.host_bytes or cluster.host_link is None:
        return 0.0
    exposed = 0.0
    outputs, inputs = (layers_on_host(work.layers, part) for part in (work.outputs_on_host, work.inputs_on_host))
    for layer in range(max(outputs, inputs)):
        nbytes = work.kept_output * (layer < outputs) + work.hidden * (layer < inputs)
        copy_s = nbytes / (cluster.host_link * 1e9)
        exposed += max(0.0, copy_s - forward_s) + max(0.0, copy_s - backward_s)
    return exposed


def host_adam_s(model: Model, cluster: Cluster, sizes: ParallelSizes, options: TrainingOptions) -> float:
    """Return the seconds of Adam on the host, which runs once per step and overlaps with nothing."""
    if options.adam != "host" or cluster.host_link is None:
        return 0.0
    parameters = parameters_of_rank(model, sizes) / (sizes.dp * sizes.cp)
    moved_s = parameters * (options.gradient_bytes + WEIGHT) / (cluster.host_link * 1e9)
    return moved_s + cluster.gpus_per_node * parameters * _HOST_ADAM_TRAFFIC / (_HOST_ADAM_GBYTE_S * 1e9)
