"""What a training may do to need less memory: every supported combination, and how far each goes on a cluster."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

from megatron_wallfacer.planning.attention_memory import AttentionMemory
from megatron_wallfacer.planning.cluster import Cluster
from megatron_wallfacer.planning.model import RECOMPUTE, Model, Recompute
from megatron_wallfacer.planning.parallel import Adam, Software, Spread
from megatron_wallfacer.planning.rank_memory import activations
from megatron_wallfacer.planning.states import host_state_bytes
from megatron_wallfacer.planning.token_tiles import tiled

#: Adam's states and bytes of a gradient. Training tests of this project cover the first; the others are Megatron's own,
#: and need CUDA, TransformerEngine or bf16.
OPTIMIZERS: tuple[tuple[Adam, int], ...] = (("device", 4), ("device", 2), ("precision-aware", 4), ("host", 4))


@dataclass(frozen=True)
class Offer:
    """A combination of flags.

    Attributes:
        recompute: what backward computes again.
        inputs, outputs: layer inputs, and attention's outputs, are kept in host memory.
        adam, gradient_bytes: one of :data:`OPTIMIZERS`.
        loss, mlp: head, and MLPs, are computed in tiles.
    """

    recompute: Recompute
    inputs: bool = False
    outputs: bool = False
    adam: Adam = "device"
    gradient_bytes: int = 4
    loss: bool = False
    mlp: bool = False

    @property
    def kind(self) -> tuple[object, ...]:
        """Everything but tiles."""
        return self.recompute, self.inputs, self.outputs, self.adam, self.gradient_bytes


def offers(cluster: Cluster, cp_size: int, *, tested_only: bool = False) -> Iterator[Offer]:
    """Every combination that the plugin and Megatron support, fewest tiles first.

    Host memory is offered only where the cluster has both of its numbers. Tiles do not work with bf16 gradients. With
    one context-parallel rank attention is Megatron's own, and its output is not kept.
    """
    optimizers = OPTIMIZERS[:1] if tested_only else OPTIMIZERS
    sides = (False, True) if cluster.offers_host_memory else (False,)
    for recompute, (inputs, outputs) in product(RECOMPUTE, product(sides, sides)):
        if (inputs and recompute == "none") or (outputs and recompute != "keep-attention"):
            continue
        if cp_size == 1 and recompute == "keep-attention":
            continue
        for (adam, size), (loss, mlp) in product(optimizers, product((False, True), repeat=2)):
            if (size == 2 and (loss or mlp)) or (adam == "host" and not cluster.offers_host_memory):
                continue
            yield Offer(recompute, inputs, outputs, adam, size, loss, mlp)


def is_tested(software: Software) -> bool:
    """Whether tests of this project train with these flags of the optimizer."""
    return (software.adam, software.gradient_bytes) == OPTIMIZERS[0]


def resolved(
    offer: Offer,
    model: Model,
    cluster: Cluster,
    tokens: int,
    attention: AttentionMemory,
    spread: Spread,
    forward_s: float,
) -> Software:
    """Return the combination with numbers: parts of the layers on the host, and tiles.

    Args:
        offer: the combination.
        model: that is trained.
        cluster: its host memory and host link.
        tokens: tokens per context-parallel rank.
        attention: what attention allocates and keeps.
        spread: sizes of the groups.
        forward_s: seconds of a layer's forward pass, behind whose kernels copies run.
    """
    software = Software(recompute=offer.recompute, adam=offer.adam, gradient_bytes=offer.gradient_bytes)
    work = activations(model, tokens, attention, spread, software)
    if offer.inputs or offer.outputs:
        per_layer = work.hidden * offer.inputs + work.kept_output * offer.outputs
        left = 1e9 * (cluster.host_memory_gb or 0.0) / cluster.gpus_per_node - host_state_bytes(model, spread, software)
        fraction = _fraction(left / per_layer, forward_s * 1e9 * (cluster.host_link or 0.0) / per_layer, work.layers)
        software = replace(software, inputs_on_host=fraction * offer.inputs, outputs_on_host=fraction * offer.outputs)
        work = activations(model, tokens, attention, spread, software)
    work = tiled(work, loss=offer.loss, mlp=offer.mlp)
    return replace(software, loss_tiles=work.loss_tiles, mlp_tiles=work.mlp_tiles)


def _fraction(layers_that_fit: float, layers_hidden: float, layers: int) -> float:
    """Part of the layers, whole layers only: as many as fit the host, and as many bytes as a layer's time copies."""
    fitting = int(max(0.0, min(layers, layers_that_fit)))
    return min(fitting, int(min(1.0, layers_hidden) * layers)) / layers
