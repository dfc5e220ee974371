"""Libraries that are not installed: functions with the parameters of a release, computed by the reference kernel.

They keep to what the libraries do and not to what one would like: alignment of windows, -1 and None, clamping, which
tensors are read without looking at strides, what is returned and in which order.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from megatron_wallfacer.kernels.protocol import AttnSpec
from megatron_wallfacer.kernels.reference import ReferenceKernel
from megatron_wallfacer.schedule.attn_tile import AttnTile, TileWindow

Compute = Callable[[dict[str, Any]], dict[str, Any]]
_REFERENCE = ReferenceKernel()
#: File name with which the functions of a fake library are compiled.
LIBRARY = "<library>"


def definition(source: str) -> ast.FunctionDef:
    """Of ``name(parameters) -> (names of what is returned)``."""
    head, _, returned = source.partition(" -> ")
    return ast.parse(f"def {head}:\n    return {returned}").body[0]


def function(source: ast.FunctionDef, compute: Compute) -> Callable[..., Any]:
    """A function with the parameters of a definition that returns, of what is computed, what the definition names."""
    bare = ast.parse("def f():\n    return _answer(locals())").body[0]
    bare.name, bare.args = source.name, source.args
    for argument in ast.walk(bare.args):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    names, is_tuple = _names_returned(source)

    def answer(given: dict[str, Any]) -> Any:
        results = compute(given)
        found = tuple(results.get(name) for name in names)
        return found if is_tuple else found[0]

    scope: dict[str, Any] = {"_answer": answer}
    exec(compile(ast.fix_missing_locations(ast.Module([bare], [])), LIBRARY, "exec"), scope)
    return scope[source.name]


def returned(source: ast.FunctionDef) -> ast.expr:
    """What the last ``return`` of a function says."""
    return max((node for node in ast.walk(source) if isinstance(node, ast.Return)), key=lambda node: node.lineno).value


def _names_returned(source: ast.FunctionDef) -> tuple[list[str], bool]:
    """Names of what is returned last, and whether they are a tuple. ``*rest`` is left out."""
    value = returned(source)
    if isinstance(value, ast.IfExp):
        value = value.body
    if not isinstance(value, ast.Tuple):
        return [ast.unparse(value)], False
    return [ast.unparse(element) for element in value.elts if not isinstance(element, ast.Starred)], True


def flash2(*functions: ast.FunctionDef) -> SimpleNamespace:
    return _flash(functions, _flash2_window)


def flash3(*functions: ast.FunctionDef) -> SimpleNamespace:
    return _flash(functions, _flash3_window)


def flash4(*functions: ast.FunctionDef) -> SimpleNamespace:
    return _flash(functions, _flash4_window)


def _flash(functions: tuple[ast.FunctionDef, ...], window_of: Callable[..., TileWindow]) -> SimpleNamespace:
    """Functions of forward and backward in turn: two that may be packed, or two that may not and two that are."""

    def attend(given: dict[str, Any]) -> dict[str, Any]:
        assert given.get("return_lse", True)
        _check_flash(given, "q", "k", "v")
        parts = [
            _REFERENCE.forward(*tensors, *_call(given, tensors, window_of))
            for tensors in _documents(given, ("q", "k", "v"))
        ]
        out, lse = (_together(given, pieces) for pieces in zip(*parts, strict=True))
        lse = lse.transpose(-1, -2).contiguous()
        return {"out": out.contiguous(), "softmax_lse": lse, "lse": lse}

    def differentiate(given: dict[str, Any]) -> dict[str, Any]:
        name = "softmax_lse" if "softmax_lse" in given else "lse"
        lse, q = given[name], given["q"]
        _check_flash(given, "dout", "q", "k", "v", "out")
        assert lse.is_contiguous()
        assert lse.shape == (*q.shape[:-3], q.shape[-2], q.shape[-3])
        straight = given | {name: lse.transpose(-1, -2)}
        parts = [
            _REFERENCE.backward(*tensors, *_call(given, tensors[1:3], window_of))
            for tensors in _documents(straight, ("dout", "q", "k", "v", "out", name))
        ]
        grads = [_together(given, pieces) for pieces in zip(*parts, strict=True)]
        results = dict(zip(("dq", "dk", "dv"), grads, strict=True))
        for name, grad in results.items():
            if given.get(name) is not None:
                given[name].copy_(grad)
        return results

    computed = (attend, differentiate) * (len(functions) // 2)
    return SimpleNamespace(**{f.name: function(f, compute) for f, compute in zip(functions, computed, strict=True)})


def _check_flash(given: dict[str, Any], *names: str) -> None:
    for name in names:
        assert given[name].stride(-1) == 1, f"{name} must have a contiguous last dimension"
    assert given.get("dropout_p", 0.0) == 0.0
    packing = {f"{word}_{side}" for word in ("cu_seqlens", "max_seqlen") for side in "qk"}
    if _is_packed(given):
        for side in "qk":
            _check_ends(given[f"cu_seqlens_{side}"], given[f"max_seqlen_{side}"], given[side])
    else:
        assert all(given.get(name) is None for name in packing)
        assert given["q"].dim() == 4
    unused = set(given) - {"dropout_p", "return_softmax", "return_lse", "deterministic", *names} - packing
    assert all(given[name] is None for name in unused if name.startswith(("cu_", "max_", "seq", "alibi", "page")))


def _is_packed(given: dict[str, Any]) -> bool:
    return given.get("cu_seqlens_q") is not None


def _check_ends(ends: Tensor, longest: int, x_thd: Tensor) -> None:
    """Where documents begin and end, as the libraries read it without a look: they cover the tensor."""
    assert (ends.dtype, ends.device, ends.dim()) == (torch.int32, x_thd.device, 1)
    assert x_thd.dim() == 3
    assert (ends[0], ends[-1]) == (0, len(x_thd))
    assert longest == ends.diff().max()


def _documents(given: dict[str, Any], names: tuple[str, ...]) -> list[tuple[Tensor, ...]]:
    """These tensors sbhd (the lse sbh): of each document, or of the one tile."""
    if not _is_packed(given):
        return [tuple(given[name].transpose(0, 1) for name in names)]
    return _split(given, names, given["cu_seqlens_q"], given["cu_seqlens_k"])


def _split(given: dict[str, Any], names: tuple[str, ...], rows: Tensor, cols: Tensor) -> list[tuple[Tensor, ...]]:
    ends = (cols if name in ("k", "v") else rows for name in names)
    pieces = (given[name].unsqueeze(1).split(e.diff().tolist()) for name, e in zip(names, ends, strict=True))
    return list(zip(*pieces, strict=True))


def _together(given: dict[str, Any], pieces: tuple[Tensor, ...]) -> Tensor:
    """What was computed of each document, in the layout of the library's tensors: thd or bshd."""
    whole = torch.cat(pieces)
    return whole.squeeze(1) if _is_packed(given) else whole.transpose(0, 1)


def _call(
    given: dict[str, Any], tensors: tuple[Tensor, ...], window_of: Callable[..., TileWindow]
) -> tuple[AttnTile, AttnSpec]:
    """Tile and spec of the reference kernel, for q and k of a document."""
    rows, cols = len(tensors[0]), len(tensors[1])
    left, right = given.get("window_size") or (given["window_size_left"], given["window_size_right"])
    if given.get("is_causal", given.get("causal")):
        right = 0
    tile = AttnTile((0, rows), (0, cols), window=window_of(left, right, rows, cols))
    return tile, AttnSpec(given["softmax_scale"], given.get("softcap") or 0.0)


def _flash2_window(left: int, right: int, rows: int, cols: int) -> TileWindow:
    left, right = (-1 if side >= cols else side for side in (left, right))
    if left < 0 and right < 0:
        return TileWindow()
    left, right = (cols if side < 0 else side for side in (left, right))
    return TileWindow(left + rows - cols, cols - rows + right)


def _flash3_window(left: int, right: int, rows: int, cols: int) -> TileWindow:
    left, right = (cols - 1 if left < 0 else left), (rows - 1 if right < 0 else right)
    return TileWindow(left + rows - cols, cols - rows + right)


def _flash4_window(left: int | None, right: int | None, rows: int, cols: int) -> TileWindow:
    apart = cols - rows
    return TileWindow(None if left is None else left - apart, None if right is None else apart + right)


def transformer_engine(forward: ast.FunctionDef, backward: ast.FunctionDef) -> SimpleNamespace:
    """``fused_attn_fwd`` and ``fused_attn_bwd``; they return what the extension does, not names of their own."""

    def attend(given: dict[str, Any]) -> dict[str, Any]:
        assert given["is_training"]
        _check_te(given, "q", "k", "v")
        parts = [
            _REFERENCE.forward(*tensors, *_te_call(given, tensors)) for tensors in _te_documents(given, ("q", "k", "v"))
        ]
        out, lse = (torch.cat(pieces) for pieces in zip(*parts, strict=True))
        if given["q"].dim() == 3:
            out, stats = out.squeeze(1), lse.squeeze(1)
        else:
            stats = lse.permute(1, 2, 0)
        aux = [stats.unsqueeze(-1).contiguous(), torch.zeros(2, dtype=torch.int64)]
        return {"output_tensors[0]": out, "output_tensors[1:]": aux}

    def differentiate(given: dict[str, Any]) -> dict[str, Any]:
        _check_te(given, "q", "k", "v", "o", "d_o")
        stats, random = given["aux_ctx_tensors"]
        q, device = given["q"], given["q"].device
        packed = q.dim() == 3
        assert stats.shape == (*(q.shape[:2] if packed else (q.shape[1], q.shape[2], q.shape[0])), 1)
        assert stats.is_contiguous()
        assert (random.dtype, random.shape, random.device) == (torch.int64, (2,), device)
        assert given.get("dqkv_dtype", "theirs") == "theirs"
        lse = stats.squeeze(-1) if packed else stats.squeeze(-1).permute(2, 0, 1)
        parts = [
            _REFERENCE.backward(*tensors, *_te_call(given, tensors[1:3]))
            for tensors in _te_documents(given | {"lse": lse}, ("d_o", "q", "k", "v", "o", "lse"))
        ]
        grads = [torch.cat(pieces) for pieces in zip(*parts, strict=True)]
        return {"output_tensors": [*(g.squeeze(1) if packed else g for g in grads), None, None]}

    library = SimpleNamespace(FusedAttnBackend={"F16_arbitrary_seqlen": "cudnn"})
    library.TORCH_DType = {"theirs": torch.float64}
    library.tex = SimpleNamespace(get_cudnn_version=lambda: 90600)
    library.fused_attn_fwd, library.fused_attn_bwd = function(forward, attend), function(backward, differentiate)
    return library


def _check_te(given: dict[str, Any], *names: str) -> None:
    q, k, layout = given["q"], given["k"], "thd" if given["q"].dim() == 3 else "sbhd"
    for name in names:
        assert given[name].is_contiguous()
    assert {given.get(name, layout) for name in ("o_format", "do_format")} == {layout}
    layouts = {given.get(name, f"{layout}_{layout}_{layout}") for name in ("qkv_layout", "dqkv_layout")}
    assert layouts == {f"{layout}_{layout}_{layout}"}
    for side, x in (("q", q), ("kv", k)):
        ends, padded, longest = (given[f"{name}_{side}{end}"] for name, end in _TE_ENDS)
        if layout == "thd":
            _check_ends(ends, longest, x)
            assert padded.tolist() == ends.tolist()
        else:
            assert longest == len(x)
            assert ends.tolist() == [longest * i for i in range(x.shape[1] + 1)]
            assert (ends.dtype, padded) == (torch.int32, None)
    assert (given["fused_attention_backend"], given["fake_dtype"]) == ("cudnn", q.dtype)
    assert (given["attn_bias_type"], given["dropout"]) == ("no_bias", 0.0)
    assert not given.get("bottom_right_diagonal")


_TE_ENDS = (("cu_seqlens", ""), ("cu_seqlens", "_padded"), ("max_seqlen", ""))


def _te_documents(given: dict[str, Any], names: tuple[str, ...]) -> list[tuple[Tensor, ...]]:
    """These tensors sbhd (the lse sbh): of each document, or of the one tile."""
    if given["q"].dim() == 4:
        return [tuple(given[name] for name in names)]
    return _split(given, names, given["cu_seqlens_q"], given["cu_seqlens_kv"])


def _te_call(given: dict[str, Any], tensors: tuple[Tensor, ...]) -> tuple[AttnTile, AttnSpec]:
    """Tile and spec of the reference kernel, for q and k of a document."""
    rows, cols = len(tensors[0]), len(tensors[1])
    tile = AttnTile((0, rows), (0, cols), window=_te_window(given, rows, cols))
    return tile, AttnSpec(given["attn_scale"])


def _te_window(given: dict[str, Any], rows: int, cols: int) -> TileWindow:
    left, right = given["window_size"]
    kinds = ("no_mask", "causal") if given["q"].dim() == 4 else ("padding", "padding_causal")
    assert given["attn_mask_type"] == kinds[right == 0]
    assert (left, right) == (-1, -1) or rows <= cols
    return TileWindow(None if left == -1 else left, None if right == -1 else right)


def from_schema(operator: torch._ops.OpOverload) -> ast.FunctionDef:
    """The definition that says the same as the schema of an operator of the PyTorch that is installed."""
    plain, keyword = [], []
    for argument in operator._schema.arguments:
        default = f"={argument.default_value!r}" if argument.has_default_value() else ""
        (keyword if argument.kwarg_only else plain).append(argument.name + default)
    returned = [one.name or f"unnamed_{index}" for index, one in enumerate(operator._schema.returns)]
    name = operator._schema.name.removeprefix("aten::")
    return definition(f"{name}({', '.join([*plain, '*', *keyword])}) -> ({', '.join(returned)},)")


class Aten:
    """PyTorch's fused operators for GPUs with the parameters that they have in the PyTorch that is installed.

    Args:
        lse_has_width: cuDNN's lse is [b, h, s, 1] and not [b, h, s].
    """

    def __init__(self, *, lse_has_width: bool = False) -> None:
        self._lse_has_width = lse_has_width
        computed = {
            "_flash_attention_forward": self._flash_forward,
            "_flash_attention_backward": self._flash_backward,
            "_scaled_dot_product_cudnn_attention": self._cudnn_forward,
            "_scaled_dot_product_cudnn_attention_backward": self._cudnn_backward,
        }
        for name, compute in computed.items():
            setattr(self, name, function(from_schema(getattr(torch.ops.aten, name).default), compute))

    def _flash_forward(self, given: dict[str, Any]) -> dict[str, Any]:
        assert (given["max_q"], given["max_k"]) == (given["query"].shape[1], given["key"].shape[1])
        assert given["cum_seq_q"] is None
        q, k, v = (given[name].transpose(0, 1) for name in ("query", "key", "value"))
        out, lse = _REFERENCE.forward(q, k, v, *self._flash_call(given))
        return {"output": out.transpose(0, 1), "softmax_logsumexp": lse.permute(1, 2, 0)}

    def _flash_backward(self, given: dict[str, Any]) -> dict[str, Any]:
        assert (given["max_q"], given["max_k"]) == (given["query"].shape[1], given["key"].shape[1])
        assert given["cum_seq_q"] is None
        assert given["logsumexp"].is_contiguous()
        tensors = (given[name].transpose(0, 1) for name in ("grad_out", "query", "key", "value", "out"))
        grads = _REFERENCE.backward(*tensors, given["logsumexp"].permute(2, 0, 1), *self._flash_call(given))
        return {f"unnamed_{index}": grad.transpose(0, 1) for index, grad in enumerate(grads)}

    def _flash_call(self, given: dict[str, Any]) -> tuple[AttnTile, AttnSpec]:
        assert given["dropout_p"] == 0.0
        left, right = (
            -1 if given[f"window_size_{s}"] is None else given[f"window_size_{s}"] for s in ("left", "right")
        )
        right = 0 if given["is_causal"] else right
        rows, cols = given["query"].shape[1], given["key"].shape[1]
        tile = AttnTile((0, rows), (0, cols), window=_flash2_window(left, right, rows, cols))
        return tile, AttnSpec(given["scale"])

    def _cudnn_forward(self, given: dict[str, Any]) -> dict[str, Any]:
        assert given["compute_log_sumexp"]
        q, k, v = (given[name].permute(2, 0, 1, 3) for name in ("query", "key", "value"))
        out, lse = _REFERENCE.forward(q, k, v, *self._cudnn_call(given))
        lse_bhs = lse.permute(1, 2, 0)
        return {
            "output": out.permute(1, 2, 0, 3),
            "logsumexp": lse_bhs.unsqueeze(-1) if self._lse_has_width else lse_bhs,
        }

    def _cudnn_backward(self, given: dict[str, Any]) -> dict[str, Any]:
        stats: Tensor = given["logsumexp"]
        assert (stats.dim() == 4) == self._lse_has_width
        assert given["cum_seq_q"] is None
        assert (given["max_q"], given["max_k"]) == (given["query"].shape[2], given["key"].shape[2])
        lse = (stats.squeeze(-1) if self._lse_has_width else stats).permute(2, 0, 1)
        tensors = (given[name].permute(2, 0, 1, 3) for name in ("grad_out", "query", "key", "value", "out"))
        grads = _REFERENCE.backward(*tensors, lse, *self._cudnn_call(given))
        return {f"unnamed_{index}": grad.permute(1, 2, 0, 3) for index, grad in enumerate(grads)}

    def _cudnn_call(self, given: dict[str, Any]) -> tuple[AttnTile, AttnSpec]:
        assert given["attn_bias"] is None
        assert given["dropout_p"] == 0.0
        rows, cols = given["query"].shape[2], given["key"].shape[2]
        return AttnTile((0, rows), (0, cols), given["is_causal"]), AttnSpec(given["scale"])
