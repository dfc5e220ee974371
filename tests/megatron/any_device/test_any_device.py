"""What Megatron lacks without its libraries is replaced only where it is missing."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.fusions.fused_layer_norm import FusedLayerNorm
from megatron.core.optimizer import distrib_optimizer

from megatron_wallfacer.megatron.any_device import dataset_helpers, norms, optimizer_state, uneven
from megatron_wallfacer.megatron.any_device.thd import _complete, partitioned_indices


def norm_config(normalization: str) -> SimpleNamespace:
    keys = ("layernorm_zero_centered_gamma", "persist_layer_norm", "sequence_parallel", "memory_efficient_layer_norm")
    return SimpleNamespace(normalization=normalization, **dict.fromkeys(keys, False))


def test_apexs_norm_leaves_other_norms_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without TransformerEngine, TransformerBlock takes Apex's norm, which rejects RMSNorm."""
    with pytest.raises(AssertionError, match="RMSNorm"):
        FusedLayerNorm(config=norm_config("RMSNorm"), hidden_size=8)
    monkeypatch.setattr(FusedLayerNorm, "__new__", norms._layer_norm_only(object.__new__))
    norm = FusedLayerNorm(config=norm_config("RMSNorm"), hidden_size=8, eps=1e-6)
    assert isinstance(norm, torch.nn.RMSNorm)
    assert norm.eps == 1e-6
    with pytest.raises(ValueError, match="Apex must be installed"):  # its own constructor
        FusedLayerNorm(config=norm_config("LayerNorm"), hidden_size=8)


@pytest.mark.parametrize(("backend", "ours"), [("gloo", True), ("nccl", False)])
def test_only_gloo_gets_padded_parts(monkeypatch: pytest.MonkeyPatch, backend: str, ours: bool) -> None:
    calls: list[str] = []

    def remember(name: str) -> Any:
        return lambda *_: calls.append(name)

    monkeypatch.setattr(uneven.dist, "get_backend", lambda group: backend)
    monkeypatch.setattr(uneven, "gather_uneven", remember("ours"))
    monkeypatch.setattr(uneven, "reduce_scatter_uneven", remember("ours"))
    for wrapper in (uneven._gathering, uneven._reduce_scattering):
        wrapper(remember("Megatron's"))(torch.ones(3), object(), [1, 2])
        wrapper(remember("Megatron's"))(torch.ones(3), object(), [2, 2])
    assert calls == ["ours" if ours else "Megatron's", "Megatron's"] * 2


@pytest.mark.parametrize(("makefile", "source", "current"), [(False, 2, True), (True, 1, True), (True, 3, False)])
def test_a_checkout_whose_source_has_changed_is_compiled(
    tmp_path: Path, makefile: bool, source: int, current: bool
) -> None:
    """`make` does it, as without the plugin; a wheel has no Makefile."""
    for name, seconds in {"helpers_cpp.so": 2, "helpers.cpp": source, **({"Makefile": 0} if makefile else {})}.items():
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (seconds, seconds))
    assert dataset_helpers._is_current(tmp_path / "helpers_cpp.so") is current


def test_an_adam_of_a_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    wrapped: list[str] = []
    monkeypatch.setattr(optimizer_state, "wrap", lambda name, make: wrapped.append(name))
    monkeypatch.setattr(distrib_optimizer, "HAVE_APEX_OR_TE", True)
    optimizer_state.install()
    assert not wrapped
    monkeypatch.setattr(distrib_optimizer, "HAVE_APEX_OR_TE", False)
    optimizer_state.install()
    assert [name.rpartition(".")[2] for name in wrapped] == ["state_dict", "load_state_dict"]


def test_packed_batches_are_cut_by_the_library_that_is_there() -> None:
    library = SimpleNamespace(thd_get_partitioned_indices=object())
    assert _complete(library) is library
    assert _complete(None).thd_get_partitioned_indices is partitioned_indices


def test_indices_are_on_the_device_of_the_boundaries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Megatron selects with them from a batch on that device."""
    ends = torch.tensor([0, 8], device="meta")
    monkeypatch.setattr(torch.Tensor, "tolist", lambda _: [0, 8])
    assert partitioned_indices(ends, 8, 2, 0).device.type == "meta"
