"""Checks of Python, PyTorch, GPUs and communication backends."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_wallfacer.doctor import pytorch

REPOSITORY = Path(__file__).parents[2]


def test_what_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pytorch.sys, "version_info", (3, 11, 9))
    assert [(f.status, f.remedy) for f in pytorch.python()] == [("problem", "use Python 3.12 or newer")]
    monkeypatch.setattr(torch, "__version__", "2.5.1+cu124")
    assert [(f.status, f.remedy) for f in pytorch.torch_version()] == [("problem", "install torch 2.6 or newer")]
    monkeypatch.setattr(torch, "__version__", "2.10.0a0+git")
    assert [f.status for f in pytorch.torch_version()] == ["ok"]


def test_bounds_are_those_of_setup() -> None:
    setup = (REPOSITORY / "setup.py").read_text()
    assert f'"torch>={pytorch._text(pytorch.TORCH)},' in setup
    assert f'python_requires=">={pytorch._text(pytorch.PYTHON)}"' in setup


def test_a_gpu_that_torch_does_not_see(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    (found,) = pytorch.cuda()
    assert found.status == "problem"
    assert found.result.startswith("CUDA_VISIBLE_DEVICES=0, but torch")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert [f.status for f in pytorch.cuda()] == ["note"]


def test_gpus_without_nccl(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert next(iter(pytorch.communication())).status == "problem"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert next(iter(pytorch.communication())).status == "note"
