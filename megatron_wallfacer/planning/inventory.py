"""Buffers of a rank during a training step, and the moments at which they are live, for the planner and for tests.

Sizes assume bf16, fused SwiGLU and fused rotary positions, and fused norms unless ``Activations.fused_norms`` is False.
Temporary memory inside kernels is not included. ``python -m benchmarks.memory`` counts the buffers of Megatron's own
model, and prints them next to this inventory.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal, get_args

from megatron_wallfacer.planning.attention_memory import AttentionMemory
from megatron_wallfacer.planning.model import Model, Recompute

#: Moments of a step at which memory can be at its peak. ``forward`` is attention's forward pass in the last layer, or
#: its recomputation. ``mlp``, ``attention`` and ``projection`` (to q, k and v) are parts of the layer's backward pass.
Moment = Literal["forward", "head", "mlp", "attention", "projection"]
MOMENTS: tuple[Moment, ...] = get_args(Moment)
_IN_BACKWARD: tuple[Moment, ...] = ("mlp", "attention", "projection")
_BF16, _FP32 = 2, 4
#: Device buffers per kind of tensor in host memory. Backward reads one buffer while the other is copied.
SLOTS = 2
#: Further device buffers per kind in a pipeline, where forward of one micro-batch runs between backward of others.
PIPELINE_SLOTS = 1


@dataclass(frozen=True)
class Buffer:
    """All tensors of one kind on one rank: description, total bytes, and the moments at which they are live."""

    name: str
    nbytes: float
    moments: tuple[Moment, ...] = MOMENTS


@dataclass(frozen=True)
class Activations:
    """Sizes and options that determine the activations of one micro-batch on one rank.

    Attributes:
        model: trained model.
        tokens: tokens per context-parallel rank.
        tp: tensor-parallel size. A tensor-parallel size above 1 implies sequence parallelism.
        layers: layers of the pipeline stage times micro-batches in flight.
        in_flight: number of micro-batches in flight; above 1 only with pipeline parallelism.
        recompute: activations that backward recomputes.
        loss_tiles: value of ``--wallfacer-loss-tiles``.
        mlp_tiles: value of ``--wallfacer-mlp-tiles``.
        attention: memory that attention allocates and keeps in addition to its results.
        outputs_on_host: value of ``--wallfacer-keep-on-host``, a fraction of the layers; above 0 only with
            ``keep-attention``.
        inputs_on_host: value of ``--wallfacer-layer-inputs-on-host``, a fraction of the layers; above 0 only with
            recomputation.
        fused_gradients: whether the matrix kernel adds weight gradients to Megatron's gradient buffer.
            ``--no-gradient-accumulation-fusion`` switches this off.
        fused_norms: whether a norm saves only its input. Without TransformerEngine and Apex, Megatron uses PyTorch's
            norms, which save the input and the normalized input in fp32.
    """

    model: Model
    tokens: int
    tp: int = 1
    layers: int = 1
    in_flight: int = 1
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
        """Return the bytes of one tensor ``[s/tp, b, h]``."""
        return _BF16 * self.model.hidden * self.tokens / self.tp

    @property
    def queries(self) -> float:
        """Return the bytes of q, which equal the bytes of attention's output."""
        return _BF16 * self.model.q_heads * self.model.head_dim * self.tokens / self.tp

    @property
    def keys(self) -> float:
        """Return the bytes of k, which equal the bytes of v."""
        return _BF16 * self.model.kv_heads * self.model.head_dim * self.tokens / self.tp

    @property
    def lse(self) -> float:
        """Return the bytes of attention's log-sum-exp."""
        return _FP32 * self.model.q_heads * self.tokens / self.tp

    @property
    def activation(self) -> float:
        """Return the bytes of the output of the MLP's activation function."""
        return _BF16 * self.model.ffn_hidden * self.model.top_k * self.tokens / self.tp

    @property
    def gated(self) -> float:
        """Return the bytes of the activation function's input. SwiGLU has two inputs, a gate and an up projection."""
        return self.activation * (2 if self.model.swiglu else 1)

    @property
    def gathered(self) -> float:
        """Return the bytes of one tensor ``[s, b, h]`` that sequence parallelism gathers."""
        return _BF16 * self.model.hidden * self.tokens if self.tp > 1 else 0.0

    @property
    def logits(self) -> float:
        """Return the bytes of the logits in bf16, and of their fp32 copy for the loss."""
        return (_BF16 + _FP32) * self.model.vocabulary * self.tokens / self.tp

    @property
    def kept_output(self) -> float:
        """Return the bytes that attention of one layer keeps: output, lse, and further kept tensors."""
        return self.queries + self.lse + self.attention.kept

    @property
    def host_bytes(self) -> float:
        """Return the bytes of activations in host memory."""
        outputs = layers_on_host(self.layers, self.outputs_on_host) * self.kept_output
        return outputs + layers_on_host(self.layers, self.inputs_on_host) * self.hidden


def inventory(work: Activations) -> tuple[Buffer, ...]:
    """Return every buffer of activations and their gradients, without parameters and their states."""
    graphs = Buffer("attention's passes as CUDA graphs", work.attention.graphs)
    current = (*_current_layer(work), *_sequence_parallel(work), *_head(work))
    return (graphs, *_saved(work), *current, *(() if work.fused_norms else _unfused_norms(work)))


def layers_on_host(layers: int, fraction: float) -> int:
    """Return how many of ``layers`` layers keep tensors in host memory. The last layers keep tensors on the device."""
    return int(layers * fraction + 1e-9)


def bytes_at(buffers: Iterable[Buffer], moment: Moment) -> float:
    """Return the bytes that are live at a moment."""
    return sum(buffer.nbytes for buffer in buffers if moment in buffer.moments)


def peak(buffers: Iterable[Buffer]) -> tuple[Moment, float]:
    """Return the moment with the most live bytes, and the number of bytes."""
    buffers = tuple(buffers)
    return max(((moment, bytes_at(buffers, moment)) for moment in MOMENTS), key=lambda pair: pair[1])


def _saved(work: Activations) -> tuple[Buffer, ...]:
    """Return the tensors that all layers except the current layer save in forward for backward."""
    others = work.layers - 1
    device_inputs = work.layers if work.recompute == "none" else _on_device(work, work.inputs_on_host)
    # Megatron's pipeline schedule references the input that a stage received until backward of the micro-batch. The
    # first stage receives none, but has one more micro-batch in flight than the second stage.
    received = (work.in_flight - 1) * bool(work.inputs_on_host)
    inputs = Buffer("layer inputs", (device_inputs + received) * work.hidden)
    if work.recompute == "full":
        return (inputs,)
    if work.recompute == "keep-attention":
        kept = (_on_device(work, work.outputs_on_host) - 1) * work.kept_output
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


def _on_device(work: Activations, fraction: float) -> int:
    """Return how many layers' tensors are on the device at the same time, counting those copied back from the host."""
    on_host = layers_on_host(work.layers, fraction)
    slots = SLOTS + (PIPELINE_SLOTS if work.in_flight > 1 else 0)
    return work.layers - on_host + min(slots, on_host)


def _current_layer(work: Activations) -> tuple[Buffer, ...]:
    """Return gradients and saved tensors of the last layer. Saved tensors are live until backward has used them."""
    # Without recomputation the layer's tensors are live from forward on, otherwise from their recomputation on.
    saved_first: tuple[Moment, ...] = ("forward", "head") if work.recompute == "none" else ("forward",)
    kept_first: tuple[Moment, ...] = ("forward",) if work.recompute == "full" else ("forward", "head")
    recomputed_with_attention: tuple[Moment, ...] = ("forward",) if work.recompute == "full" else ()
    # With sequence parallelism the peak of the projection is later, when the gradients of q, k, v are one tensor.
    apart: tuple[Moment, ...] = ("projection",) if work.tp == 1 else ()
    return (
        Buffer("output of the first norm", work.hidden, (*saved_first, *_IN_BACKWARD)),
        Buffer("q, k, v before and after rotary positions", _saved_qkv(work), (*saved_first[1:], "mlp", "attention")),
        Buffer("q, k, v before and after rotary positions", _qkv(work), ("forward",)),
        Buffer("q of the projection, contiguous", work.queries, ("forward",)),
        Buffer("attention's output, lse and kept tensors", work.kept_output, (*kept_first, "mlp", "attention")),
        Buffer("attention's forward pass", work.attention.forward, ("forward",)),
        Buffer("residual and output of the second norm", 2 * work.hidden, (*saved_first[1:], "mlp")),
        # Megatron's checkpoint references the recomputed output.
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
    """Return the MLP tensors of the last layer.

    At the memory peak the activation function's output has been freed. The gradient of this output is live instead, and
    has the same size.
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
    """Return the fp32 tensors that PyTorch's norms save: their input, and their normalized input."""
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
    if work.tp == 1:
        return ()
    return (
        # Megatron keeps one gathered buffer of the largest size.
        Buffer("input gathered by sequence parallelism", work.gathered),
        Buffer("input of the head gathered by sequence parallelism", work.gathered, ("head",)),
        Buffer("gradient before and after its reduce-scatter", work.gathered + work.hidden, ("projection",)),
    )


def _head(work: Activations) -> tuple[Buffer, ...]:
    whole = work.gathered or work.hidden
    # With sequence parallelism the norm's output is freed once it is gathered.
    norm = work.hidden * (2 if work.tp == 1 else 1)
    return (
        Buffer("input and output of the last norm", norm, ("head",)),
        Buffer("logits", work.logits / work.loss_tiles, ("head",)),
        Buffer("gradient of the head's weight", _head_weight_gradient(work), ("head",)),
        Buffer("head: gradients of the tiles' inputs", whole if work.loss_tiles > 1 else 0.0, ("head",)),
    )


def _head_weight_gradient(work: Activations) -> float:
    """Return the bytes of the LM head's weight gradient beyond the freed memory of one tile's fp32 logits.

    With fused gradients the result is 0.
    """
    if work.fused_gradients:
        return 0.0
    freed = work.logits / work.loss_tiles * _FP32 / (_BF16 + _FP32)
    return max(0.0, _BF16 * work.model.vocabulary * work.model.hidden / work.tp - freed)


def _saved_qkv(work: Activations) -> float:
    return 0.0 if work.attention.exchanges_heads else _qkv(work)


def _qkv(work: Activations) -> float:
    """Return the bytes of the projection's output (q, k, v), and of q and k after rotary positions."""
    return (work.queries + 2 * work.keys) + (work.queries + work.keys)
