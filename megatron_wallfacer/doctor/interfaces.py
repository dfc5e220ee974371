"""Which network interfaces gloo and NCCL would use."""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from megatron_wallfacer.doctor.finding import Finding

_GLOO, _NCCL, _MASTER = "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "MASTER_ADDR"
#: What NCCL tries one after the other where nothing is said (ncclFindInterfaces).
_NCCL_ORDER = ("ib", "^docker,lo,virbr", "docker", "lo", "virbr")


@dataclass(frozen=True)
class Interface:
    """One with an address.

    Attributes:
        name: such as ``eth0``.
        addresses: IPv4 and IPv6.
        up: it runs.
    """

    name: str
    addresses: tuple[str, ...]
    up: bool

    @property
    def loopback(self) -> bool:
        """It leads nowhere else."""
        return all(_is_loopback(address) for address in self.addresses)

    def __str__(self) -> str:
        return f"{self.name} ({', '.join(self.addresses)}{'' if self.up else ', down'})"


def interfaces() -> list[Interface]:
    """Those of this machine that have an address."""
    import psutil

    stats = psutil.net_if_stats()
    found = []
    for name, addresses in psutil.net_if_addrs().items():
        internet = tuple(a.address for a in addresses if a.family in (socket.AF_INET, socket.AF_INET6))
        if internet:
            found.append(Interface(name, internet, name in stats and stats[name].isup))
    return found


def network() -> Iterator[Finding]:
    """All interfaces, and whether they lead anywhere."""
    there = interfaces()
    text = "; ".join(map(str, there)) or "none with an address"
    if any(one.up and not one.loopback for one in there):
        yield Finding("network", "ok", text)
    else:
        yield Finding("network", "note", text, "nothing on one machine; other machines cannot be reached from here")


def gloo_interface() -> Iterator[Finding]:
    """That of ``GLOO_SOCKET_IFNAME``, else the one with the address of the host name, as PyTorch chooses."""
    named, there = os.environ.get(_GLOO), interfaces()
    if named:
        yield from _named(named, there)
        return
    host = socket.gethostname()
    addresses = resolved(host)
    own = [one for one in there if set(addresses) & set(one.addresses)]
    remedy = f"nothing on one machine; for several export {_GLOO}={_outward(there)} on each"
    if not addresses:
        yield Finding("gloo interface", "note", f"loopback: the host name {host} does not resolve", remedy)
    elif not own and not any(map(_is_loopback, addresses)):
        text = f"the host name {host} is {', '.join(addresses)}, which no interface here has"
        yield Finding("gloo interface", "note", text, remedy)
    elif all(map(_is_loopback, addresses)):
        yield Finding("gloo interface", "note", f"loopback: the host name {host} is {', '.join(addresses)}", remedy)
    else:
        yield Finding("gloo interface", "ok", f"{'; '.join(map(str, own))}, by the host name {host}")


def nccl_interface() -> Iterator[Finding]:
    """Where NCCL's ranks meet; over InfiniBand, data take another way. Only where there are GPUs."""
    import torch

    if not torch.cuda.is_available():
        return
    wanted, there = os.environ.get(_NCCL, ""), interfaces()
    chosen = nccl_choice(there, wanted)
    text = "; ".join(map(str, chosen)) or f"none matches {_NCCL}={wanted}"
    if not chosen:
        yield Finding("nccl interface", "problem", text, f"unset {_NCCL}, or export {_NCCL}={_outward(there)}")
    elif all(one.loopback for one in chosen):
        yield Finding("nccl interface", "note", text, "nothing on one machine; other machines cannot be reached so")
    else:
        yield Finding("nccl interface", "ok", text)


def meeting_point() -> Iterator[Finding]:
    """``MASTER_ADDR``, if it is set: torchrun sets it for ranks that it starts."""
    if not (host := os.environ.get(_MASTER)):
        return
    addresses = resolved(host)
    if addresses:
        yield Finding("master address", "ok", f"{_MASTER}={host} is {', '.join(addresses)}")
    else:
        remedy = f"export {_MASTER} as the first machine is called, or its address"
        yield Finding("master address", "problem", f"{_MASTER}={host} does not resolve", remedy)


def nccl_choice(there: Sequence[Interface], wanted: str) -> list[Interface]:
    """Interfaces that NCCL takes.

    Args:
        there: those that there are.
        wanted: ``NCCL_SOCKET_IFNAME``: prefixes, with ``^`` those to be left out, with ``=`` whole names; or empty.
    """
    for pattern in (wanted,) if wanted else _NCCL_ORDER:
        if chosen := [one for one in there if one.up and _matches(pattern, one.name)]:
            return chosen
    return []


def resolved(host: str) -> list[str]:
    """Addresses of a host name; none where it has none."""
    try:
        answers = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError:
        return []
    return list(dict.fromkeys(str(answer[4][0]) for answer in answers))


def _named(named: str, there: Iterable[Interface]) -> Iterator[Finding]:
    by_name = {one.name: one for one in there}
    chosen = [by_name.get(name) for name in named.split(",")]
    if None in chosen or not all(one.up for one in chosen if one):
        text = f"{_GLOO}={named}: there is no such interface that is up and has an address"
        yield Finding("gloo interface", "problem", text, f"unset {_GLOO}, or one of {', '.join(by_name)}")
    else:
        yield Finding("gloo interface", "ok", f"{'; '.join(map(str, chosen))}, by {_GLOO}")


def _matches(pattern: str, name: str) -> bool:
    without, exact = pattern.startswith("^"), pattern.lstrip("^").startswith("=")
    words = pattern.lstrip("^").removeprefix("=").split(",")
    return without != any(name == word if exact else name.startswith(word) for word in words)


def _outward(there: Iterable[Interface]) -> str:
    """An interface to propose."""
    return next((one.name for one in there if one.up and not one.loopback), "NAME")


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback
