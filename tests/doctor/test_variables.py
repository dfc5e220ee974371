"""Checks of environment variables."""

from __future__ import annotations

import os

import pytest
import torch

from megatron_wallfacer.doctor import variables


@pytest.mark.parametrize(
    ("capability", "value", "status"),
    [
        (None, None, "ok"),
        (None, "1", "ok"),
        (None, "8", "problem"),
        (9, None, "problem"),
        (9, "1", "ok"),
        (9, "8", "problem"),
        (10, None, "ok"),
        (10, "8", "ok"),
    ],
)
def test_connections(capability: int | None, value: str | None, status: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (capability, 0))
    monkeypatch.delenv(variables.CONNECTIONS, raising=False)
    if value is not None:
        monkeypatch.setenv(variables.CONNECTIONS, value)
    assert [f.status for f in variables.connections()] == [status]


def test_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for value, status in (("1", "ok"), ("4", "note")):
        monkeypatch.setenv(variables.THREADS, value)
        assert [f.status for f in variables.threads()] == [status]


def test_restarts_name_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    for value, said in (
        ("1", "=1; torchrun --max-restarts works"),
        ("0", "only torchrun --max-restarts over gloo"),
    ):
        monkeypatch.setenv(variables.OWN_STORE, value)
        (finding,) = variables.restarts()
        assert said in finding.result


def test_others_are_shown_and_the_slow_are_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {"HOME": "/", "NCCL_DEBUG": "WARN", "NCCL_P2P_DISABLE": "1"})
    assert [(f.status, f.result) for f in variables.others()] == [
        ("ok", "NCCL_DEBUG=WARN"),
        ("note", "NCCL_P2P_DISABLE=1"),
    ]
    monkeypatch.setattr(os, "environ", {"WALLFACER_ALLOW_UNTESTED": "1"})
    assert [f.status for f in variables.others()] == ["note"]
