"""Every adapter against the functions that the libraries have published, read and not imported.

A published ``def`` statement keeps its parameters and what it returns; its body becomes the reference kernel. So an
adapter that calls it wrongly fails as it would with the library, on a machine without a GPU. Skipped without a network.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace

import pytest

from megatron_wallfacer.kernels import te
from megatron_wallfacer.kernels.flash import FLASH2 as FLASH2_VERSION
from megatron_wallfacer.kernels.flash import FLASH3 as FLASH3_VERSION
from megatron_wallfacer.kernels.flash import FLASH4 as FLASH4_VERSION
from megatron_wallfacer.kernels.flash import FlashKernel
from megatron_wallfacer.kernels.optional import UnavailableError
from megatron_wallfacer.kernels.prepared import PreparedKernel
from megatron_wallfacer.kernels.signatures import Signature
from megatron_wallfacer.kernels.te import TransformerEngineKernel
from megatron_wallfacer.schedule.attn_tile import TileWindow
from tests.kernels import fakes
from tests.kernels.problems import LocalProblem, packed, worst
from tests.kernels.published import Unreachable, published, read_signature


@dataclass(frozen=True)
class Contract:
    """An adapter, and where its functions are in a release: forward and backward, and those for packed documents."""

    package: str
    path: str
    names: tuple[str, ...]
    kernel: Callable[..., PreparedKernel]
    fake: Callable[..., SimpleNamespace]
    wheel: bool = False

    def tree(self, version: str) -> ast.Module:
        try:
            return ast.parse(published(self.package, version, self.path, wheel=self.wheel))
        except Unreachable as error:
            pytest.skip(f"no sources of {self.package} {version}: {error}")

    def functions(self, version: str) -> tuple[ast.FunctionDef, ...]:
        found = {node.name: node for node in self.tree(version).body if isinstance(node, ast.FunctionDef)}
        return tuple(found[name] for name in self.names)

    def make(self, version: str, *functions: ast.FunctionDef) -> PreparedKernel:
        return self.kernel(self.fake(*(functions or self.functions(version))), title=f"{self.package} {version}")


_FLASH = ("_flash_attn_forward", "_flash_attn_backward")
_VARLEN = ("_flash_attn_varlen_forward", "_flash_attn_varlen_backward")
_CUTE = ("flash-attn-4", "flash_attn/cute/interface.py", ("_flash_attn_fwd", "_flash_attn_bwd"))
FLASH2 = Contract(
    "flash-attn",
    "flash_attn/flash_attn_interface.py",
    _FLASH + _VARLEN,
    partial(FlashKernel, FLASH2_VERSION),
    fakes.flash2,
)
FLASH3 = Contract(
    "flash-attn", "hopper/flash_attn_interface.py", _FLASH, partial(FlashKernel, FLASH3_VERSION), fakes.flash3
)
FLASH4 = Contract(*_CUTE, partial(FlashKernel, FLASH4_VERSION), fakes.flash4, wheel=True)
#: An early one that flash-attn 2.8.3 brings under the same name.
CUTE_OF_FLASH2 = replace(FLASH4, package="flash-attn", wheel=False)
TE = Contract(
    "transformer-engine",
    "transformer_engine/pytorch/cpp_extensions/fused_attn.py",
    ("fused_attn_fwd", "fused_attn_bwd"),
    TransformerEngineKernel,
    fakes.transformer_engine,
    wheel=True,
)
FIT = {
    "flash2": (FLASH2, ("2.6.3", "2.7.4.post1", "2.8.3", "2.8.3.post2")),
    "flash3": (FLASH3, ("2.7.4.post1", "2.8.3", "2.8.3.post2")),
    "flash4": (FLASH4, ("4.0.0b4", "4.0.0b10", "4.0.0b20", "4.0.0b36")),
    "te": (TE, ("2.1.0", "2.2.0", "2.8.0", "2.10.0", "2.12.0", "2.15.0", "2.16.1", "2.18.0", "2.20.2")),
}
CASES = [(contract, version) for contract, versions in FIT.values() for version in versions]
every_release = pytest.mark.parametrize(
    ("contract", "version"), CASES, ids=[f"{name}-{v}" for name, (_, versions) in FIT.items() for v in versions]
)

TILES = {
    "causal": {"causal": True},
    "full": {"rows": 8, "cols": 20},
    "window": {"window": TileWindow(3, 0)},
    "capped": {"causal": True, "softcap": 0.8},
}


@pytest.mark.parametrize(
    ("name", "version", "tile"),
    [
        (name, version, tile)
        for name, (contract, versions) in FIT.items()
        for version in versions
        for tile in TILES
        if tile != "capped" or name != "te"
    ],
)
def test_published_functions_are_called_as_they_are(name: str, version: str, tile: str) -> None:
    kernel = FIT[name][0].make(version)
    problem = LocalProblem(q_heads=4, kv_heads=2, **TILES[tile])
    assert worst(problem.solved_by(kernel), problem.solution()) <= 1e-13


@pytest.mark.parametrize("problem", [packed((5, 1, 6), q_heads=4, kv_heads=2), packed((5, 1), (2, 8))])
@every_release
def test_published_functions_take_packed_documents(
    monkeypatch: pytest.MonkeyPatch, contract: Contract, version: str, problem: LocalProblem
) -> None:
    monkeypatch.setattr(te, "capability", lambda device: (9, 0))
    kernel = contract.make(version)
    assert kernel.capabilities.varlen
    assert worst(problem.solved_by(kernel), problem.solution()) <= 1e-13


_LENGTHS = {"cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"}
_TE_LENGTHS = {"cu_seqlens_q_padded", "cu_seqlens_kv_padded", "max_seqlen_q", "max_seqlen_kv"}
#: By kernel: parameters of its functions that a call must not do without.
VITAL = {
    "flash2": (
        {"softmax_scale", "causal", "softcap"},
        {"softmax_lse", "softmax_scale", "causal", "dq", "dk", "dv"},
        {"softmax_scale", "causal", "softcap", *_LENGTHS},
        {"softmax_lse", "softmax_scale", "causal", "dq", "dk", "dv", *_LENGTHS},
    ),
    "flash3": (
        {"softmax_scale", "causal", "softcap", *_LENGTHS},
        {"softmax_lse", "softmax_scale", "deterministic", "dq", *_LENGTHS},
    ),
    "flash4": (
        {"softmax_scale", "causal", "window_size_left", "window_size_right", "return_lse", *_LENGTHS},
        {"lse", "softmax_scale", "causal", "window_size_left", "window_size_right", "deterministic", *_LENGTHS},
    ),
    "te": (
        {"attn_scale", "attn_mask_type", "window_size", "qkv_layout", "fake_dtype", *_TE_LENGTHS},
        {"aux_ctx_tensors", "attn_scale", "attn_mask_type", "window_size", "qkv_layout", "deterministic", *_TE_LENGTHS},
    ),
}


@pytest.mark.parametrize(
    ("name", "direction", "parameter"),
    [(name, i, p) for name, all_of in VITAL.items() for i, names in enumerate(all_of) for p in sorted(names)],
)
def test_a_renamed_parameter_is_caught(name: str, direction: int, parameter: str) -> None:
    contract, versions = FIT[name]
    functions = contract.functions(versions[-1])
    arguments = functions[direction].args
    (found,) = [a for a in (*arguments.args, *arguments.kwonlyargs) if a.arg == parameter]
    found.arg = "renamed"
    with pytest.raises(UnavailableError, match=rf"{contract.names[direction]} has no {parameter}; needs "):
        contract.make(versions[-1], *functions)


@every_release
def test_a_new_parameter_without_a_default_is_caught(contract: Contract, version: str) -> None:
    for index in range(len(contract.names)):
        functions = contract.functions(version)
        functions[index].args.args.insert(0, ast.arg("brand_new"))
        with pytest.raises(UnavailableError, match="requires brand_new, which the plugin does not pass; needs "):
            contract.make(version, *functions)


@pytest.mark.parametrize(
    ("contract", "version", "found"),
    [
        (FLASH2, "2.5.9.post1", "_flash_attn_forward has no softcap; needs flash-attn >= 2.6, < 3"),
        (FLASH3, "2.6.3", "_flash_attn_forward has no "),
        (CUTE_OF_FLASH2, "2.8.3", "_flash_attn_fwd has no return_lse; needs flash-attn-4 >= 4.0.0b4"),
    ],
)
def test_releases_that_do_not_fit_are_rejected_with_the_reason(contract: Contract, version: str, found: str) -> None:
    with pytest.raises(UnavailableError, match=f"{contract.package} {version}: {found}"):
        contract.make(version)


@every_release
def test_read_and_probed_signatures_are_the_same(contract: Contract, version: str) -> None:
    functions = contract.functions(version)
    library = contract.fake(*functions)
    for read in functions:
        made = Signature.of(getattr(library, read.name), name=read.name, owner="x", needs="y")
        assert made == read_signature(read, owner="x", needs="y")


@pytest.mark.parametrize("version", FIT["te"][1])
def test_names_that_transformer_engine_is_given_are_its_own(version: str) -> None:
    tree = TE.tree(version)
    (backends,) = [node for node in tree.body if "FusedAttnBackend" in _names(node)]
    text = ast.unparse(tree)
    assert "F16_arbitrary_seqlen" in ast.unparse(backends)
    assert all(repr(name) in text for name in ("sbhd_sbhd_sbhd", "no_mask", "causal", "no_bias"))
    assert any("TORCH_DType" in _names(node) for node in tree.body)
    assert [ast.unparse(fakes.returned(function)) for function in TE.functions(version)] == [
        "(output_tensors[0], output_tensors[1:])",
        "output_tensors",
    ]


def _names(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.ClassDef):
        return [node.name]
    return [ast.unparse(target) for target in node.targets] if isinstance(node, ast.Assign) else []
