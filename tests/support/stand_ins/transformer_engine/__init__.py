"""A package in TransformerEngine's place, as Megatron sees it: everything imports, and what gets a CPU tensor raises.

Put its folder on PYTHONPATH. Modules are made when they are imported; a name in one is a class that takes any
arguments. Layers have the parameters of the real ones, so that models can be built from them.
"""

from __future__ import annotations

import contextlib
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Iterable
from types import ModuleType
from typing import Any

import torch
from torch import nn

__version__ = "2.16.0"
#: Of its modules, those that Megatron 0.19 and the plugin import.
_MODULES = frozenset(
    "pytorch common recipe fp8 tensor optimizers attention rope distributed cpp_extensions fused_attn permutation "
    "cross_entropy router cpu_offload cpu_offload_v1 module base float8_tensor mxfp8_tensor nvfp4_tensor "
    "grouped_tensor utils graph ops ep quantization float8_blockwise_tensor jit quantized_tensor".split()
)


def reject_cpu(values: Iterable[Any]) -> None:
    """Raise as CUDA code does that is given a tensor of the host.

    Raises:
        RuntimeError: there is one, in lists too.
    """
    for value in values:
        if isinstance(value, torch.Tensor) and value.device.type == "cpu":
            raise RuntimeError("CUDAGuardImpl initialized with non-CUDA DeviceType: cpu")
        if isinstance(value, list | tuple):
            reject_cpu(value)


class Anything(nn.Module):
    """A class, or a function: calling it makes an object of it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        reject_cpu([*args, *kwargs.values()])

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        reject_cpu([*args, *kwargs.values()])
        raise NotImplementedError("there is no GPU behind it")


class Norm(Anything):
    """LayerNorm and RMSNorm."""

    def __init__(self, normalized_shape: int, *, device: Any = None, params_dtype: Any = None, **kwargs: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(normalized_shape, device=device, dtype=params_dtype))
        self.weight.sequence_parallel = kwargs["sequence_parallel"]


class Linear(Anything):
    """Linear, LayerNormLinear."""

    def __init__(
        self, in_features: int, out_features: int, *, device: Any = None, params_dtype: Any = None, **kwargs: Any
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        split, size = kwargs.get("parallel_mode"), kwargs.get("tp_size", 1)
        rows, columns = (
            out_features // (size if split == "column" else 1),
            in_features // (size if split == "row" else 1),
        )
        self.weight = nn.Parameter(torch.empty(rows, columns, device=device, dtype=params_dtype))
        if "normalization" in kwargs:
            self.layer_norm_weight = nn.Parameter(torch.ones(in_features, device=device, dtype=params_dtype))


class FusedAdam(torch.optim.Optimizer):
    """Adam whose step is a CUDA kernel."""

    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, {name: value for name, value in options.items() if name != "capturable"})

    def step(self, closure: Any = None) -> None:
        """Take no step."""
        reject_cpu([parameter for group in self.param_groups for parameter in group["params"]])


class Function(Anything):
    """An autograd function."""

    @staticmethod
    def apply(*args: Any) -> Any:
        """Reject tensors of the host."""
        reject_cpu(args)


_CLASSES: dict[str, Any] = {
    "_SplitAlongDim": Function,
    "LayerNorm": Norm,
    "RMSNorm": Norm,
    "Linear": Linear,
    "LayerNormLinear": Linear,
    "GroupedLinear": type("GroupedLinear", (Anything,), {}),
    "FusedAdam": FusedAdam,
    "get_cpu_offload_context": lambda *_, **__: (contextlib.nullcontext(), lambda tensor: tensor),
    "FusedAttnBackend": {"F16_arbitrary_seqlen": object()},
}


def _fused_attn(body: str) -> Any:
    """A function with a signature that the plugin reads; it has no kernel."""
    names: dict[str, Any] = {}
    exec(f"def function({body}):\n    raise NotImplementedError('there is no GPU behind it')", names)
    return names["function"]


_SIZES = "max_seqlen_q, max_seqlen_kv, cu_seqlens_q, cu_seqlens_kv"
_REST = (
    "fused_attention_backend, attn_bias=None, cu_seqlens_q_padded=None, cu_seqlens_kv_padded=None, attn_scale=None, "
    "dropout=0.0, fast_zero_fill=True, qkv_layout='sbh3d', o_format='sbhd', attn_bias_type='no_bias', "
    "attn_mask_type='padding', softmax_type='vanilla', window_size=(-1, -1)"
)
_CLASSES["fused_attn_fwd"] = _fused_attn(f"is_training, {_SIZES}, q, k, v, fake_dtype, {_REST}")
_CLASSES["fused_attn_bwd"] = _fused_attn(
    f"{_SIZES}, q, k, v, o, d_o, fake_dtype, aux_ctx_tensors, {_REST}, do_format='sbhd', dqkv_layout='sbh3d', "
    "deterministic=False"
)


class _Module(ModuleType):
    """One module of the package."""

    def __getattr__(self, name: str) -> Any:
        """A submodule, or a class of this name."""
        if name.startswith("__"):
            raise AttributeError(name)
        if name in _MODULES:
            return importlib.import_module(f"{self.__name__}.{name}")
        found = _CLASSES.get(name) or type(name, (Anything,), {"__module__": self.__name__})
        if isinstance(found, type) and found.__name__ != name:
            found = type(name, (found,), {"__module__": self.__name__})
        setattr(self, name, found)
        return found


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Makes modules of the package."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        if fullname.startswith(f"{__name__}.") and fullname.rpartition(".")[2] in _MODULES:
            return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        return None

    def create_module(self, spec: Any) -> ModuleType:
        return _Module(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """There is nothing in it before it is asked for."""


sys.meta_path.append(_Finder())


def __getattr__(name: str) -> Any:
    if name in ("pytorch", "common"):
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(name)
