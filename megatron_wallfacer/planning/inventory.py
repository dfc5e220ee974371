"""Buffers of a rank during a training step, and the moments at which they are live: one list for planner and tests.

Sizes are in bf16, with fused SwiGLU and rotary positions. Temporary memory of kernels is not listed. Norms are fused
unless ``Activations.fused_norms`` is False.
``python -m benchmarks.memory`` counts the same on Megatron's model and prints both.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from megatron_wallfacer.planning.attention_memory import AttentionMemory
from megatron_wallfacer.planning.model import Model, Recompute

#: Moments of a step at which memory can be at its peak. ``forward``: attention's forward pass of the last layer, or its
#: recomputation. ``mlp``, ``attention``, ``projection``: parts of that layer's backward pass, with the projection to q,
#: k and v.
Moment = Literal["forward", "head", "mlp", "attention", "projection"]
MOMENTS: tuple[Moment, ...] = ("forward", "head", "mlp", "attention", "projection")
_IN_BACKWARD: tuple[Moment, ...] = ("mlp", "attention", "projection")
_BF16, _FP32 = 2, 4
#: Device buffers for each kind of tensor that is kept in host memory: one is read while the other is copied.
SLOTS = 2


@dataclass(frozen=True)
class Buffer:
    """All tensors of one kind on one rank.

    Attributes:
        name: name of the tensors for tables.
        nbytes: total bytes.
        moments: moments at which the tensors are live.
    """

    name: str
    nbytes: float
    moments: tuple[Moment, ...] = MOMENTS


@dataclass(frozen=True)
class Activations:
    """Activations of one micro-batch on one rank.

    Attributes:
        model: trained model.
        tokens: tokens per context-parallel rank.
        tp: tensor-parallel size; above 1 with sequence parallelism.
        layers: layers of the pipeline stage times micro-batches in flight.
        recompute: activations that backward recomputes.
        loss_tiles: ``--wallfacer-loss-tiles``.
        mlp_tiles: ``--wallfacer-mlp-tiles``.
        attention: memory that attention allocates and keeps in addition to its results.
        outputs_on_host: ``--wallfacer-keep-on-host``, part of the layers; with ``keep-attention`` only.
        inputs_on_host: ``--wallfacer-layer-inputs-on-host``, part of the layers; with recomputation only.
        fused_gradients: whether the matrix kernel adds weight gradients to Megatron's gradient buffer (without
            ``--no-gradient-accumulation-fusion``).
        fused_norms: whether a norm saves its input only. Without TransformerEngine and Apex, Megatron's norms are
            PyTorch's, which save fp32 copies before and after normalization.
    """

    model: Model
    tokens: int
    tp: int = 1
    layers: int = 1
    recompute: Recompute = "full"
    loss_tiles: int = 1
    mlp_tiles: int = 1
    attention: AttentionMemory = field(default_factory=AttentionMemory)
    outputs_on_host: float = 0.0
    inputs_on_host: float = 0.0
    fused_gradients: bool = True
    fused_norms: bool = True

    @property
    def hidden(self) -> float:
        """Bytes of one tensor ``[s/tp, b, h]``."""
        return _BF16 * self.model.hidden * self.tokens / self.tp

    @property
    def queries(self) -> float:
        """Bytes of q, and of attention's output."""
        return _BF16 * self.model.q_heads * self.model.head_dim * self.tokens / self.tp

    @property
    def keys(self) -> float:
        """Bytes of k, and of v."""
        return _BF16 * self.model.kv_heads * self.model.head_dim * self.tokens / self.tp

    @property
    def lse(self) -> float:
        """Bytes of attention's log-sum-exp."""
        return _FP32 * self.model.q_heads * self.tokens / self.tp

    @property
    def activation(self) -> float:
        """Bytes of the output of the MLP's activation function."""
        return _BF16 * self.model.ffn_hidden * self.model.top_k * self.tokens / self.tp

    @property
    def gated(self) -> float:
        """Bytes of the input of the activation function: gate and up projection with SwiGLU."""
        return self.activation * (2 if self.model.swiglu else 1)

    @property
    def gathered(self) -> float:
        """Bytes of one tensor ``[s, b, h]`` that sequence parallelism gathers."""
        return _BF16 * self.model.hidden * self.tokens if self.tp > 1 else 0.0

    @property
    def logits(self) -> float:
        """Bytes of logits in bf16 and, for the loss, in fp32."""
        return (_BF16 + _FP32) * self.model.vocabulary * self.tokens / self.tp

    @property
    def kept_output(self) -> float:
        """Bytes that attention of one layer keeps: output, lse, and tensors of the grid."""
        return self.queries + self.lse + self.attention.kept

    @property
    def host_bytes(self) -> float:
        """Bytes in host memory."""
        outputs = layers_on_host(self.layers, self.outputs_on_host) * self.kept_output
        return outputs + layers_on_host(self.layers, self.inputs_on_host) * self.hidden


def inventory(work: Activations) -> tuple[Buffer, ...]:
    """Return every buffer of activations and their gradients, without parameters and their states."""
    graphs = Buffer("attention's passes as CUDA graphs", work.attention.graphs)
    current = (*_current_layer(work), *_sequence_parallel(work), *_head(work))
    return (graphs, *_saved(work), *current, *(() if work.fused_norms else _unfused_norms(work)))


def layers_on_host(layers: int, fraction: float) -> int:
    """Return the number of layers with a tensor in host memory. The last layers keep the tensor on the device."""
    return int(layers * fraction + 1e-9)


def bytes_at(buffers: Iterable[Buffer], moment: Moment) -> float:
    """Return the bytes that are live at a moment."""
    return sum(buffer.nbytes for buffer in buffers if moment in buffer.moments)


def peak(buffers: Iterable[Buffer]) -> tuple[Moment, float]:
    """Return the moment with the most live bytes, and these bytes."""
    buffers = tuple(buffers)
    sizes: Mapping[Moment, float] = {moment: bytes_at(buffers, moment) for moment in MOMENTS}
    moment = max(MOMENTS, key=sizes.__getitem__)
    return moment, sizes[moment]


def _saved(work: Activations) -> tuple[Buffer, ...]:
    """Return the tensors that layers save from forward to backward, without the current layer."""
    others = work.layers - 1
    inputs = Buffer("layer inputs", work.layers * work.hidden) if work.recompute == "none" else _inputs(work)
    if work.recompute == "full":
        return (inputs,)
    if work.recompute == "keep-attention":
        kept = (_on_device(work.layers, work.outputs_on_host) - 1) * work.kept_output
        return inputs, Buffer("attention's outputs, lse and kept tensors", kept)
    attention = Buffer("attention's outputs, lse and kept tensors", others * work.kept_output)
    mlp = 0.0 if work.mlp_tiles > 1 else others * (work.gated + work.activation)
    return (
        inputs,
        attention,
        Buffer("norm outputs and residuals", others * 3 * work.hidden),
        Buffer("q, k, v before and after rotary positions", others * _saved_qkv(work)),
        Buffer("MLP: input and output of the activation function", mlp),
    )


def _inputs(work: Activations) -> Buffer:
    nbytes = _on_device(work.layers, work.inputs_on_host) * work.hidden
    return Buffer("layer inputs", nbytes)


def _on_device(layers: int, fraction: float) -> int:
    """Return the layers with a tensor on the device, and the device buffers of layers with a tensor on the host."""
    on_host = layers_on_host(layers, fraction)
    return layers - on_host + min(SLOTS, on_host)


def _current_layer(work: Activations) -> tuple[Buffer, ...]:
    """Return the tensors of the last layer: saved ones until backward has used them, and gradients."""
    # Without recomputation its tensors are live from forward on, else from their recomputation on.
    saved_first: tuple[Moment, ...] = ("forward", "head") if work.recompute == "none" else ("forward",)
    kept_first: tuple[Moment, ...] = ("forward",) if work.recompute == "full" else ("forward", "head")
    recomputed_with_attention: tuple[Moment, ...] = ("forward",) if work.recompute == "full" else ()
    # With sequence parallelism the projection's peak is later, when these are one tensor.
    apart: tuple[Moment, ...] = ("projection",) if work.tp == 1 else ()
    return (
        Buffer("output of the first norm", work.hidden, (*saved_first, *_IN_BACKWARD)),
        Buffer("q, k, v before and after rotary positions", _saved_qkv(work), (*saved_first[1:], "mlp", "attention")),
        Buffer("q, k, v before and after rotary positions", _qkv(work), ("forward",)),
        Buffer("q of the projection, contiguous", work.queries, ("forward",)),
        Buffer("attention's output, lse and kept tensors", work.kept_output, (*kept_first, "mlp", "attention")),
        Buffer("attention's forward pass", work.attention.forward, ("forward",)),
        Buffer("residual and output of the second norm", 2 * work.hidden, (*saved_first[1:], "mlp")),
        # Megatron's checkpoint holds the recomputed output.
        Buffer("output of the recomputed layer", work.hidden * (work.recompute != "none"), _IN_BACKWARD),
        Buffer("gradient of the layer's output", work.hidden, (*recomputed_with_attention, *_IN_BACKWARD)),
        Buffer("gradient of the residual", work.hidden, ("attention", "projection")),
        Buffer("gradient of attention's output", work.queries, ("attention",)),
        Buffer("gradients of q, k, v", work.queries + 2 * work.keys, ("attention", *apart)),
        Buffer("gradient of the projection", work.queries + 2 * work.keys, ("projection",)),
        Buffer("attention's backward pass", work.attention.backward, ("attention",)),
        *_mlp(work),
    )


def _mlp(work: Activations) -> tuple[Buffer, ...]:
    """Return the MLP's tensors of the last layer at the gradient of its activation function's input.

    At that moment the activation function's output is free, and its gradient is as large.
    """
    tiles = work.mlp_tiles
    saved: tuple[Moment, ...] = ("head", "mlp") if work.recompute == "none" and tiles == 1 else ("mlp",)
    inside = (work.gated + work.activation) / tiles
    return (
        Buffer("MLP: input and output of the activation function", inside, saved),
        Buffer("MLP: gradient of the activation function's input", work.gated / tiles, ("mlp",)),
        Buffer("MLP: gradients of the tiles' inputs", work.hidden if tiles > 1 else 0.0, ("mlp",)),
    )


def _unfused_norms(work: Activations) -> tuple[Buffer, ...]:
    """Return the fp32 tensors that PyTorch's norms save: their input, and their input over its root mean square."""
    name = "fp32 copies of unfused norms"
    saved = 2 * _FP32 / _BF16 * work.hidden
    others = 2 * (work.layers - 1) * saved if work.recompute == "none" else 0.0
    first: tuple[Moment, ...] = ("forward", "head") if work.recompute == "none" else ("forward",)
    second: tuple[Moment, ...] = ("head", "mlp") if work.recompute == "none" else ("mlp",)
    return (
        Buffer(f"{name} of other layers", others),
        Buffer(f"{name} before attention", saved, (*first, *_IN_BACKWARD)),
        Buffer(f"{name} before the MLP", saved, second),
        Buffer(f"{name} before the head", saved, ("head",)),
    )


def _sequence_parallel(work: Activations) -> tuple[Buffer, ...]:
    """Return the tensors that sequence parallelism gathers, and gradients around a reduce-scatter."""
    if work.tp == 1:
        return ()
    return (
        # Megatron keeps one buffer of the largest size.
        Buffer("input gathered by sequence parallelism", work.gathered),
        Buffer("input of the head gathered by sequence parallelism", work.gathered, ("head",)),
        Buffer("gradient before and after its reduce-scatter", work.gathered + work.hidden, ("projection",)),
    )


def _head(work: Activations) -> tuple[Buffer, ...]:
    whole = work.gathered or work.hidden
    # The norm's output is free once it is gathered.
    norm = work.hidden * (2 if work.tp == 1 else 1)
    return (
        Buffer("input and output of the last norm", norm, ("head",)),
        Buffer("logits", work.logits / work.loss_tiles, ("head",)),
        Buffer("gradient of the head's weight", _head_weight_gradient(work), ("head",)),
        Buffer("head: gradients of the tiles' inputs", whole if work.loss_tiles > 1 else 0.0, ("head",)),
    )


def _head_weight_gradient(work: Activations) -> float:
    """Return the bytes by which the weight's gradient exceeds the fp32 logits, which are freed before it."""
    if work.fused_gradients:
        return 0.0
    freed = work.logits / work.loss_tiles * _FP32 / (_BF16 + _FP32)
    return max(0.0, _BF16 * work.model.vocabulary * work.model.hidden / work.tp - freed)


def _saved_qkv(work: Activations) -> float:
    return 0.0 if work.attention.exchanges_heads else _qkv(work)


def _qkv(work: Activations) -> float:
    """Return the bytes of the projection's output with v, and of q and k after rotary positions."""
    return (work.queries + 2 * work.keys) + (work.queries + work.keys)
