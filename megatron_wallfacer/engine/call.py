"""The arguments of an attention call, without tensors, and the compiled passes for given tensor shapes."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from megatron_wallfacer.engine.compiled import CompiledPass, compile_pass
from megatron_wallfacer.engine.execute import PassResults, execute
from megatron_wallfacer.engine.foreign import ForeignCaptures
from megatron_wallfacer.engine.graphed import Graphs
from megatron_wallfacer.engine.timeline import Observer, no_observer
from megatron_wallfacer.engine.transfers import Transfers
from megatron_wallfacer.engine.verify import VerifiedRun
from megatron_wallfacer.errors import WallfacerError
from megatron_wallfacer.kernels.protocol import AttnSpec, Kernel, accumulation_dtype
from megatron_wallfacer.schedule.heads import check_heads, head_groups
from megatron_wallfacer.schedule.lower import lower
from megatron_wallfacer.schedule.mask import CAUSAL, Mask, chunk_mask_of
from megatron_wallfacer.schedule.ops import Schedule
from megatron_wallfacer.schedule.plan import Plan
from megatron_wallfacer.schedule.rows import contiguous
from megatron_wallfacer.schedule.schedule import backward_schedule, forward_schedule
from megatron_wallfacer.schedule.volume import Shape


@dataclass(frozen=True)
class Runtime:
    """The objects that run a schedule on one rank.

    Attributes:
        scale: factor of the scores.
        observer: function that returns a context manager around each pass, operation and wait.
        softcap: cap of the scores; 0 for no cap.
        graphs: object that runs passes as CUDA graphs or inside Megatron's CUDA graphs; None for eager passes only.
    """

    transfers: Transfers
    kernel: Kernel
    scale: float
    observer: Observer = no_observer
    softcap: float = 0.0
    graphs: Graphs | ForeignCaptures | None = None


@dataclass(frozen=True)
class Call:
    """All arguments of one call of attention except tensors.

    Attributes:
        keep_gathered_q: whether forward keeps gathered queries for backward. Otherwise backward gathers queries again.
        layer: number of the layer in the whole model, from 1, or its name; None outside a model. Errors and other
            messages contain it, and ranks compare it if ``verify`` is True.
        verify: whether every message is compared with its source. If so, passes do not run as CUDA graphs.
        number: unique number of the call. Operators of PyTorch cannot have a :class:`Call` as argument, so they get
            this number (:func:`call_of_number`).
        run: function that runs a compiled pass, such as :func:`megatron_wallfacer.engine.execute.execute`.
    """

    plan: Plan
    runtime: Runtime
    mask: Mask = CAUSAL
    keep_gathered_q: bool = False
    layer: int | str | None = None
    verify: bool = False
    number: int = field(default_factory=itertools.count().__next__, init=False, compare=False)
    run: Callable[..., PassResults] = field(init=False, compare=False, repr=False)
    #: Function from a tensor to the strides for which passes are lowered.
    _strides: Callable[[Tensor], tuple[int, ...]] = field(init=False, compare=False, repr=False)
    #: Number that is equal for calls that lower to equal passes, apart from sizes. Such calls share compiled passes.
    _alike: int = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        runtime = self.runtime
        alike = self.plan, runtime.kernel, runtime.scale, runtime.softcap, self.mask, self.keep_gathered_q
        object.__setattr__(self, "_alike", runtime.transfers.passes.number_of(alike, self.mask.nbytes))
        # Documents differ with every micro-batch, so a graph of a pass with documents would not be replayed.
        graphs = runtime.graphs if self.mask.documents is None and not self.verify else None
        eager = VerifiedRun(self) if self.verify else execute
        object.__setattr__(self, "run", eager if graphs is None else graphs.run)
        object.__setattr__(self, "_strides", Tensor.stride if graphs is None else graphs.strides)
        _calls[self.number] = weakref.ref(self, lambda _, number=self.number: _calls.pop(number, None))

    def forward_pass(self, q: Tensor, k: Tensor, v: Tensor, *, sinks: bool) -> CompiledPass:
        """Return the compiled forward pass for the sizes of the given tensors, sbhd.

        Raises:
            OptionError: The size of the head axis does not divide the heads, or :meth:`Mask.check` rejects the mask.
        """
        passes, strides = self.runtime.transfers.passes, (self._strides(q), self._strides(k), self._strides(v))
        key = self._alike, sinks, q.shape, k.shape, v.shape, strides, q.dtype, q.device
        found = passes.get(key)
        if found is None:
            self.check(q, k)
            shape = _shape(q, k.shape[2], q.shape[3], v.shape[3])
            named = dict(zip("qkv", strides, strict=True))
            compiled = self._compile(forward_schedule, shape, named, q, sinks=sinks)
            found = passes.add(key, compiled, compiled.host_bytes)
        return found

    def backward_pass(self, own: Mapping[str, Tensor], kv_heads: int, head_dim: int) -> CompiledPass:
        """Return the compiled backward pass, whose last input is delta, contiguous ``[tokens / P, batch, q_heads]``.

        ``own`` has the local tensors dout, out and lse. If forward did not exchange heads, ``own`` also has q, k and v.
        """
        passes, out = self.runtime.transfers.passes, own["out"]
        strides = tuple(map(self._strides, own.values()))
        key = self._alike, out.shape, kv_heads, head_dim, strides, out.dtype, out.device
        found = passes.get(key)
        if found is None:
            shape = _shape(out, kv_heads, head_dim, out.shape[3])
            named = dict(zip(own, strides, strict=True)) | {"delta": contiguous(out.shape[:3])}
            compiled = self._compile(backward_schedule, shape, named, out)
            found = passes.add(key, compiled, compiled.host_bytes)
        return found

    def check(self, q: Tensor, k: Tensor) -> None:
        """Check heads and sequence length of the local tensors, sbhd.

        Raises:
            OptionError: The size of the head axis does not divide the heads, or :meth:`Mask.check` rejects the mask.
        """
        cp_size = self.plan.grid.cp_size
        check_heads(self.plan, q.shape[2], k.shape[2])
        self.mask.check(cp_size, cp_size * q.shape[0])

    def _compile(
        self, build: Any, shape: Shape, strides: Mapping[str, tuple[int, ...]], like: Tensor, *, sinks: bool = False
    ) -> CompiledPass:
        runtime = self.runtime
        schedule = self.schedule(build, shape)
        varlen = runtime.kernel.capabilities.varlen
        all_to_all = runtime.transfers.all_to_all
        program = lower(schedule, shape, self.mask, strides, varlen=varlen, sinks=sinks, all_to_all=all_to_all)
        spec = AttnSpec(runtime.scale, runtime.softcap)
        return compile_pass(program, runtime.kernel, spec, runtime.transfers, like.device, like.dtype)

    def schedule(self, build: Any, shape: Shape) -> Schedule:
        """Return the schedule of this rank. ``build`` is :func:`forward_schedule` or :func:`backward_schedule`."""
        return build(
            self.plan,
            self.runtime.transfers.groups.rank,
            causal=self.mask.right == 0,
            groups=head_groups(self.plan, shape.q_heads, shape.kv_heads),
            keep_gathered_q=self.keep_gathered_q,
            chunk_mask=chunk_mask_of(self.mask, self.plan.grid.cp_size, shape.tokens // 2),
        )


def _shape(like: Tensor, kv_heads: int, head_dim: int, v_head_dim: int) -> Shape:
    tokens, batch, q_heads, _ = like.shape
    return Shape(
        tokens=tokens,
        q_heads=q_heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        v_head_dim=v_head_dim,
        batch=batch,
        itemsize=like.dtype.itemsize,
        accumulate_itemsize=accumulation_dtype(like.dtype).itemsize,
    )


# Operators of PyTorch take numbers instead of objects. The registry does not keep calls alive.
_calls: dict[int, weakref.ref[Call]] = {}


def call_of_number(number: int) -> Call:
    """Return the call of attention with the given :attr:`Call.number`.

    Raises:
        WallfacerError: The :class:`Call` has been deleted.
    """
    reference = _calls.get(number)
    call = reference() if reference is not None else None
    if call is None:
        raise WallfacerError(
            f"attention call {number} no longer exists: keep a reference to its Call object as long as compiled code "
            "uses the number"
        )
    return call
