"""Checks of network interfaces."""

from __future__ import annotations

import socket

import pytest
import torch

from megatron_wallfacer.doctor import interfaces
from megatron_wallfacer.doctor.interfaces import Interface, nccl_interfaces

LO = Interface("lo", ("127.0.0.1", "::1"), up=True)
ETH0, IB0 = Interface("eth0", ("192.0.2.2",), up=True), Interface("ib0", ("192.0.2.3",), up=True)
DOWN = Interface("eth1", ("192.0.2.4",), up=False)


class TestNetwork:
    @pytest.fixture(autouse=True)
    def machine(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "MASTER_ADDR"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr(interfaces, "interfaces", lambda: [LO, ETH0, DOWN])
        monkeypatch.setattr(socket, "gethostname", lambda: "box")
        self.resolves(monkeypatch, "192.0.2.2")

    def resolves(self, monkeypatch: pytest.MonkeyPatch, *addresses: str) -> None:
        monkeypatch.setattr(interfaces, "resolved", lambda _: list(addresses))

    def test_this_node_has_a_loopback(self) -> None:
        import psutil

        assert "lo" in psutil.net_if_addrs()

    def test_of_the_host_name(self, monkeypatch: pytest.MonkeyPatch) -> None:
        (found,) = interfaces.gloo_interface()
        assert (found.status, found.result) == ("ok", "eth0 (192.0.2.2), by the host name box")
        for addresses, text in (
            ((), "loopback: the host name box does not resolve"),
            (("127.0.1.1",), "loopback: the host name box is 127.0.1.1"),
            (("198.51.100.7",), "the host name box is 198.51.100.7, and no interface has this address"),
        ):
            self.resolves(monkeypatch, *addresses)
            (found,) = interfaces.gloo_interface()
            assert (found.status, found.result) == ("note", text)
            assert "export GLOO_SOCKET_IFNAME=eth0" in found.remedy

    def test_of_the_variable(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for value, status in (("eth0", "ok"), ("lo,eth0", "ok"), ("eth1", "problem"), ("eth0,eth9", "problem")):
            monkeypatch.setenv("GLOO_SOCKET_IFNAME", value)
            assert [f.status for f in interfaces.gloo_interface()] == [status], value

    def test_loopback_only(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert [f.status for f in interfaces.network()] == ["ok"]
        monkeypatch.setattr(interfaces, "interfaces", lambda: [LO, DOWN])
        (found,) = interfaces.network()
        assert found.status == "note"
        assert found.result == "lo (127.0.0.1, ::1); eth1 (192.0.2.4, down)"

    def test_nccl_chooses(self) -> None:
        docker, bridge = Interface("docker0", ("172.17.0.1",), up=True), Interface("virbr0", ("192.0.2.9",), up=True)
        for there, wanted, chosen in (
            ([LO, ETH0, IB0, docker], "", [IB0]),
            ([LO, ETH0, DOWN, docker, bridge], "", [ETH0]),
            ([LO, docker], "", [docker]),
            ([LO, bridge], "", [LO]),
            ([LO, ETH0, IB0], "eth", [ETH0]),
            ([LO, ETH0, IB0], "^lo,ib", [ETH0]),
            ([LO, ETH0, IB0], "=eth", []),
            ([LO, ETH0, IB0], "=eth0", [ETH0]),
            ([LO, ETH0, IB0], "^=eth0,lo", [IB0]),
            ([LO, DOWN], "eth", []),
        ):
            assert nccl_interfaces(there, wanted) == chosen, (there, wanted)

    def test_nccl_matters_where_there_are_gpus(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("NCCL_SOCKET_IFNAME", "eth9")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert list(interfaces.nccl_interface()) == []
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        (found,) = interfaces.nccl_interface()
        assert (found.status, found.result) == ("problem", "no interface matches NCCL_SOCKET_IFNAME=eth9")
        monkeypatch.setenv("NCCL_SOCKET_IFNAME", "lo")
        assert [f.status for f in interfaces.nccl_interface()] == ["note"]

    def test_the_master(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert list(interfaces.master_address()) == []
        monkeypatch.setenv("MASTER_ADDR", "first")
        assert [f.status for f in interfaces.master_address()] == ["ok"]
        self.resolves(monkeypatch)
        assert [f.status for f in interfaces.master_address()] == ["problem"]


def test_names_are_resolved() -> None:
    assert "127.0.0.1" in interfaces.resolved("127.0.0.1")
    assert interfaces.resolved("no.such.host.invalid") == []
