"""Supported combinations of memory-saving flags, and the options of a training step for each combination."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Literal

from megatron_wallfacer.planning.attention_memory import AttentionMemory
from megatron_wallfacer.planning.cluster import Cluster
from megatron_wallfacer.planning.model import RECOMPUTE, Model, Recompute
from megatron_wallfacer.planning.rank_memory import activations, host_state_bytes
from megatron_wallfacer.planning.token_tiles import tiled
from megatron_wallfacer.planning.training_options import Adam, ParallelSizes, TrainingOptions

#: (state of Adam, bytes per element of a gradient). The first pair is the plain optimizer. The second pair rounds
#: gradients to bf16. This project's tests train with both.
OPTIMIZERS: tuple[tuple[Adam, int], ...] = (("device", 4), ("device", 2))
#: Optimizers that need CUDA or TransformerEngine, so that no test trains with them.
UNTESTED_OPTIMIZERS: tuple[tuple[Adam, int], ...] = (("precision-aware", 4), ("host", 4))

#: Which optimizers a search considers: fp32 gradients and states on the device, or all that tests train with, or all.
Optimizers = Literal["plain", "tested", "all"]
_OPTIMIZERS = {"plain": OPTIMIZERS[:1], "tested": OPTIMIZERS, "all": OPTIMIZERS + UNTESTED_OPTIMIZERS}


@dataclass(frozen=True)
class FlagCombination:
    """Memory-saving flags that are switched on. Numbers of tiles, and of layers in host memory, are chosen later.

    Layer inputs and attention's outputs may be kept in host memory. ``gradient_bytes`` is per element. The LM head with
    the loss, and the MLPs, may be computed in token tiles.
    """

    recompute: Recompute
    inputs_on_host: bool = False
    outputs_on_host: bool = False
    adam: Adam = "device"
    gradient_bytes: int = 4
    loss_tiles: bool = False
    mlp_tiles: bool = False

    @property
    def without_tiles(self) -> FlagCombination:
        """Return a copy with untiled loss and MLPs."""
        return replace(self, loss_tiles=False, mlp_tiles=False)


def flag_combinations(cluster: Cluster, cp_size: int, optimizers: Optimizers = "tested") -> Iterator[FlagCombination]:
    """Yield every supported combination of flags.

    Combinations that differ only in tiles are consecutive, and the combination without tiles is the first of them.
    Flags for host memory need a cluster with ``host_link`` and ``host_memory_gb``. Tiled loss and MLPs are not
    supported with bf16 gradients. With one context-parallel rank Megatron's own attention runs, so its output is not
    kept in recomputed layers.
    """
    on_host = (False, True) if cluster.offers_host_memory else (False,)
    for recompute, (inputs, outputs) in product(RECOMPUTE, product(on_host, on_host)):
        if (inputs and recompute == "none") or (outputs and recompute != "keep-attention"):
            continue
        if cp_size == 1 and recompute == "keep-attention":
            continue
        for (adam, size), (loss, mlp) in product(_OPTIMIZERS[optimizers], product((False, True), repeat=2)):
            if (size == 2 and (loss or mlp)) or (adam == "host" and not cluster.offers_host_memory):
                continue
            yield FlagCombination(recompute, inputs, outputs, adam, size, loss, mlp)


def has_plain_optimizer(options: TrainingOptions) -> bool:
    """Return whether gradients and Adam's states are in fp32 on the device."""
    return (options.adam, options.gradient_bytes) == OPTIMIZERS[0]


def training_options(
    flags: FlagCombination,
    model: Model,
    cluster: Cluster,
    tokens: int,
    attention: AttentionMemory,
    sizes: ParallelSizes,
    forward_s: float,
) -> TrainingOptions:
    """Return the options of a training step with the given flags.

    The result includes numbers of tiles, and fractions of layers whose tensors are kept in host memory.

    Each context-parallel rank has ``tokens`` tokens. ``forward_s`` are the seconds of a layer's forward pass, which
    overlaps copies to host memory.
    """
    options = TrainingOptions(recompute=flags.recompute, adam=flags.adam, gradient_bytes=flags.gradient_bytes)
    work = activations(model, tokens, attention, sizes, options)
    inputs, outputs = flags.inputs_on_host, flags.outputs_on_host
    if inputs or outputs:
        per_layer = work.hidden * inputs + work.kept_output * outputs
        left = 1e9 * (cluster.host_memory_gb or 0.0) / cluster.gpus_per_node - host_state_bytes(model, sizes, options)
        overlapped = forward_s * 1e9 * (cluster.host_link or 0.0)
        # A whole number of layers that fit, and that is small enough for the overlapped part of each layer's copy.
        fitting = int(max(0.0, min(work.layers, left / per_layer)))
        fraction = min(fitting, int(min(1.0, overlapped / per_layer) * work.layers)) / work.layers
        options = replace(options, inputs_on_host=fraction * inputs, outputs_on_host=fraction * outputs)
        work = activations(model, tokens, attention, sizes, options)
    work = tiled(work, loss=flags.loss_tiles, mlp=flags.mlp_tiles)
    return replace(options, loss_tiles=work.loss_tiles, mlp_tiles=work.mlp_tiles)
