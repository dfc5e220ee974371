"""FlashAttention 2, 3 and 4. Each is an instance of one class, with a table of its names and arguments.

FlashAttention's tensors are bshd with any strides, and its windows are counted from the bottom-right corner. Tensors of
packed documents are thd, with an lse ``[heads, rows]``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from megatron_wallfacer.kernels.optional import FLASH_ATTN_2, FLASH_ATTN_3, FLASH_ATTN_4, Library
from megatron_wallfacer.kernels.prepared import BackwardCall, ForwardCall, PreparedKernel, TensorKind
from megatron_wallfacer.kernels.protocol import FUSED, AttnSpec, Capabilities, Gradients
from megatron_wallfacer.kernels.signatures import LibraryFunction, LoadedLibrary, OptionalArgument
from megatron_wallfacer.kernels.windows import bottom_right, cu_seqlens_tensor
from megatron_wallfacer.schedule.attn_tile import AttnTile, CuSeqlens

#: Parameters of the library functions for packed documents.
_VARLEN = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
_CAPABILITIES = replace(FUSED, softcap=True, varlen=True)


@dataclass(frozen=True)
class FlashVersion:
    """The names and arguments that differ between versions of FlashAttention.

    Attributes:
        needs: supported releases, as error messages print them.
        functions: names of the library functions for forward and for backward.
        varlen_functions: names of the functions for packed documents; None if ``functions`` accept documents.
        lse: name of backward's parameter for the log-sum-exp.
        forward: constant arguments of forward.
        backward: constant arguments of backward.
        no_limit: value of a window argument for a side without a limit.
        no_softcap: value of forward's argument ``softcap`` that means no cap. In backward this value is always 0.0.
        lse_places: map from the length of forward's result tuple to the index of lse. The default index is 1.
    """

    name: str
    library: Library
    needs: str
    capabilities: Capabilities
    functions: tuple[str, str] = ("_flash_attn_forward", "_flash_attn_backward")
    varlen_functions: tuple[str, str] | None = None
    lse: str = "softmax_lse"
    forward: Mapping[str, Any] = field(default_factory=dict)
    backward: Mapping[str, Any] = field(default_factory=dict)
    no_limit: int | None = -1
    no_softcap: float | None = 0.0
    lse_places: Mapping[int, int] = field(default_factory=dict)


FLASH2 = FlashVersion(
    name="flash2",
    library=FLASH_ATTN_2,
    # Releases before 2.6 do not cap logits, and their lse has another layout.
    needs="flash-attn >= 2.6, < 3",
    capabilities=_CAPABILITIES,
    varlen_functions=("_flash_attn_varlen_forward", "_flash_attn_varlen_backward"),
    forward={"return_softmax": False, "dropout_p": 0.0, "alibi_slopes": None},
    backward={"dropout_p": 0.0, "alibi_slopes": None},
    # Up to 2.6 the result includes the inputs: (out, q, k, v, out_padded, lse, ...). Since 2.7 it is (out, lse, ...).
    lse_places={8: 5},
)
#: Parameters for caches and fp8, which have no defaults in releases up to 2.8.3.
_UNUSED_FORWARD = (
    *("k_new", "v_new", "qv", "out", "cu_seqlens_k_new", "seqused_q", "seqused_k", "page_table", "kv_batch_idx"),
    *("leftpad_k", "rotary_cos", "rotary_sin", "seqlens_rotary", "q_descale", "k_descale", "v_descale"),
)
#: Parameters of backward; ``sequed`` is FlashAttention's spelling.
_UNUSED_BACKWARD = ("sequed_q", "sequed_k")
FLASH3 = FlashVersion(
    name="flash3",
    library=FLASH_ATTN_3,
    needs="flash-attn-3 as of flash-attention 2.7.4 to 2.8.3 or its main branch",
    capabilities=replace(_CAPABILITIES, compute_capabilities=(9,), v_head_dim=True),
    forward=dict.fromkeys(_UNUSED_FORWARD, OptionalArgument(None)) | dict.fromkeys(_VARLEN),
    backward=dict.fromkeys(_UNUSED_BACKWARD, OptionalArgument(None)) | dict.fromkeys(_VARLEN),
)
FLASH4 = FlashVersion(
    name="flash4",
    library=FLASH_ATTN_4,
    needs="flash-attn-4 >= 4.0.0b4",
    capabilities=replace(_CAPABILITIES, compute_capabilities=(9, 10), v_head_dim=True),
    functions=("_flash_attn_fwd", "_flash_attn_bwd"),
    lse="lse",
    forward={"return_lse": True},
    # FlashAttention 4 reads -1 as a window that ends before it begins, and returns zeros without an error.
    no_limit=None,
    no_softcap=None,
)


class FlashKernel(PreparedKernel):
    """A version of FlashAttention. All releases write gradients into tensors that the caller passes.

    For ``module`` and ``title`` see :class:`LoadedLibrary`, for ``deterministic`` see :class:`PreparedKernel`.
    A library that is not installed or not supported raises :class:`UnavailableError`.
    """

    def __init__(
        self,
        version: FlashVersion,
        module: ModuleType | None = None,
        *,
        title: str | None = None,
        deterministic: bool | None = None,
    ) -> None:
        super().__init__(deterministic=deterministic)
        self._library = LoadedLibrary(version.library, version.needs, module, title)
        self._version, self.name, self.capabilities = version, version.name, version.capabilities
        self._functions = self._find(version.functions)
        self._varlen_functions = self._find(version.varlen_functions or version.functions)
        tile, spec = AttnTile((0, 1), (0, 1)), AttnSpec(1.0)
        for (forward, backward), varlen in ((self._functions, {}), (self._varlen_functions, dict.fromkeys(_VARLEN))):
            forward.bind(self._forward_arguments(forward, tile, spec) | varlen)
            backward.bind(self._backward_arguments(backward, tile, spec) | varlen)

    def prepare_forward(self, tile: AttnTile, spec: AttnSpec, tensors: TensorKind) -> ForwardCall:
        """See :meth:`PreparedKernel.prepare_forward`."""
        documents = tile.cu_seqlens
        function, _ = self._functions if documents is None else self._varlen_functions
        arguments = self._forward_arguments(function, tile, spec) | _varlen_arguments(documents, tensors.device)
        return _forward(function.bind(arguments), self._version.lse_places, varlen=documents is not None)

    def prepare_backward(self, tile: AttnTile, spec: AttnSpec, tensors: TensorKind) -> BackwardCall:
        """See :meth:`PreparedKernel.prepare_backward`."""
        documents = tile.cu_seqlens
        _, function = self._functions if documents is None else self._varlen_functions
        arguments = self._backward_arguments(function, tile, spec) | _varlen_arguments(documents, tensors.device)
        return _backward(function.bind(arguments), self._version.lse, varlen=documents is not None)

    def _find(self, names: tuple[str, str]) -> tuple[LibraryFunction, LibraryFunction]:
        gradients = ("dout", "q", "k", "v", "out", self._version.lse, "dq", "dk", "dv")
        return self._library.function(names[0], "qkv"), self._library.function(names[1], gradients)

    def _forward_arguments(self, function: LibraryFunction, tile: AttnTile, spec: AttnSpec) -> dict[str, Any]:
        softcap = spec.softcap or self._version.no_softcap
        return {**self._version.forward, "softcap": softcap} | self._mask_arguments(function, tile, spec)

    def _backward_arguments(self, function: LibraryFunction, tile: AttnTile, spec: AttnSpec) -> dict[str, Any]:
        more = {"softcap": spec.softcap, "deterministic": self.deterministic}
        return {**self._version.backward} | more | self._mask_arguments(function, tile, spec)

    def _mask_arguments(self, function: LibraryFunction, tile: AttnTile, spec: AttnSpec) -> dict[str, Any]:
        """Return the arguments for scale, mask and window, whose names may differ between forward and backward."""
        causal = {"is_causal" if function.has("is_causal") else "causal": tile.causal}
        left, right = (self._version.no_limit if side is None else side for side in bottom_right(tile))
        if function.has("window_size"):
            window = {"window_size": (left, right)}
        else:
            window = {"window_size_left": left, "window_size_right": right}
        return {"softmax_scale": spec.scale} | causal | window


def _varlen_arguments(documents: CuSeqlens | None, device: torch.device) -> dict[str, Any]:
    if documents is None:
        return {}
    boundaries = (cu_seqlens_tensor(side, device) for side in (documents.q, documents.k))
    return dict(zip(_VARLEN, (*boundaries, *documents.longest), strict=True))


def _forward(call: Callable[..., Any], lse_places: Mapping[int, int], *, varlen: bool) -> ForwardCall:
    def forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = [x.squeeze(1) if varlen else x.transpose(0, 1) for x in (q, k, v)]
        result = call(q=q, k=k, v=v)
        out, lse = result[0], result[lse_places.get(len(result), 1)]
        if varlen:
            return out.unsqueeze(1), lse.t().unsqueeze(1)
        return out.transpose(0, 1), lse.permute(2, 0, 1)

    return forward


def _backward(call: Callable[..., Any], lse_name: str, *, varlen: bool) -> BackwardCall:
    def backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> Gradients:
        dout, q, k, v, out = [x.squeeze(1) if varlen else x.transpose(0, 1) for x in (dout, q, k, v, out)]
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        # FlashAttention ignores the strides of the lse.
        stats = (lse.squeeze(1).t() if varlen else lse.permute(1, 2, 0)).contiguous()
        call(dout=dout, q=q, k=k, v=v, out=out, dq=dq, dk=dk, dv=dv, **{lse_name: stats})
        if varlen:
            return dq.unsqueeze(1), dk.unsqueeze(1), dv.unsqueeze(1)
        return dq.transpose(0, 1), dk.transpose(0, 1), dv.transpose(0, 1)

    return backward
