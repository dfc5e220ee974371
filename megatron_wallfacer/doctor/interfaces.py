"""Find the network interfaces that gloo and NCCL use."""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from megatron_wallfacer.doctor.finding import Finding

_GLOO, _NCCL, _MASTER = "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "MASTER_ADDR"
_ONE_NODE = "none needed on one node; other nodes cannot be reached"
#: Patterns that NCCL tries in this order if NCCL_SOCKET_IFNAME is not set (ncclFindInterfaces).
_NCCL_ORDER = ("ib", "^docker,lo,virbr", "docker", "lo", "virbr")


@dataclass(frozen=True)
class Interface:
    """Network interface with its IPv4 and IPv6 addresses, at least one."""

    name: str
    addresses: tuple[str, ...]
    up: bool

    @property
    def is_loopback(self) -> bool:
        """Whether the interface reaches only this node."""
        return all(_is_loopback(address) for address in self.addresses)

    def __str__(self) -> str:
        return f"{self.name} ({', '.join(self.addresses)}{'' if self.up else ', down'})"


def interfaces() -> list[Interface]:
    """Return the interfaces of this node that have an address."""
    import psutil

    stats = psutil.net_if_stats()
    result = []
    for name, addresses in psutil.net_if_addrs().items():
        internet = tuple(a.address for a in addresses if a.family in (socket.AF_INET, socket.AF_INET6))
        if internet:
            result.append(Interface(name, internet, name in stats and stats[name].isup))
    return result


def network() -> Iterator[Finding]:
    """Check that an interface of this node reaches other nodes."""
    present = interfaces()
    text = "; ".join(map(str, present)) or "no interface with an address"
    if any(interface.up and not interface.is_loopback for interface in present):
        yield Finding("network", "ok", text)
    else:
        yield Finding("network", "note", text, _ONE_NODE)


def gloo_interface() -> Iterator[Finding]:
    """Check the interface that gloo uses: ``GLOO_SOCKET_IFNAME`` if set, else the interface with the host's address."""
    named, present = os.environ.get(_GLOO), interfaces()
    if named:
        yield from _gloo_by_variable(named, present)
        return
    host = socket.gethostname()
    addresses = resolved(host)
    own = [interface for interface in present if set(addresses) & set(interface.addresses)]
    remedy = f"none needed on one node; for several nodes export {_GLOO}={_suggestion(present)} on each"
    if not addresses:
        yield Finding("gloo interface", "note", f"loopback: the host name {host} does not resolve", remedy)
    elif not own and not any(map(_is_loopback, addresses)):
        text = f"the host name {host} is {', '.join(addresses)}, and no interface has this address"
        yield Finding("gloo interface", "note", text, remedy)
    elif all(map(_is_loopback, addresses)):
        yield Finding("gloo interface", "note", f"loopback: the host name {host} is {', '.join(addresses)}", remedy)
    else:
        yield Finding("gloo interface", "ok", f"{'; '.join(map(str, own))}, by the host name {host}")


def nccl_interface() -> Iterator[Finding]:
    """On GPUs, check the network interface over which NCCL connects ranks. NCCL may send data over InfiniBand."""
    import torch

    if not torch.cuda.is_available():
        return
    wanted, present = os.environ.get(_NCCL, ""), interfaces()
    selected = nccl_interfaces(present, wanted)
    text = "; ".join(map(str, selected)) or f"no interface matches {_NCCL}={wanted}"
    if not selected:
        yield Finding("nccl interface", "problem", text, f"unset {_NCCL}, or export {_NCCL}={_suggestion(present)}")
    elif all(interface.is_loopback for interface in selected):
        yield Finding("nccl interface", "note", text, _ONE_NODE)
    else:
        yield Finding("nccl interface", "ok", text)


def master_address() -> Iterator[Finding]:
    """Check that ``MASTER_ADDR`` resolves if it is set. torchrun sets the variable for its ranks."""
    if not (host := os.environ.get(_MASTER)):
        return
    addresses = resolved(host)
    if addresses:
        yield Finding("master address", "ok", f"{_MASTER}={host} is {', '.join(addresses)}")
    else:
        remedy = f"export {_MASTER} as host name or address of the first node"
        yield Finding("master address", "problem", f"{_MASTER}={host} does not resolve", remedy)


def nccl_interfaces(present: Sequence[Interface], wanted: str) -> list[Interface]:
    """Return the interfaces that NCCL selects if ``NCCL_SOCKET_IFNAME`` has the value ``wanted``.

    ``wanted`` is a list of name prefixes, or "" if the variable is not set. With ``^`` before the list, NCCL excludes
    the interfaces with these prefixes. With ``=`` before the list, its entries are whole names.
    """
    for pattern in (wanted,) if wanted else _NCCL_ORDER:
        if selected := [interface for interface in present if interface.up and _matches(pattern, interface.name)]:
            return selected
    return []


def resolved(host: str) -> list[str]:
    """Return the addresses of a host name, or an empty list if the name does not resolve."""
    try:
        answers = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError:
        return []
    return list(dict.fromkeys(str(answer[4][0]) for answer in answers))


def _gloo_by_variable(named: str, present: Iterable[Interface]) -> Iterator[Finding]:
    by_name = {interface.name: interface for interface in present}
    selected = [by_name.get(name) for name in named.split(",")]
    if None in selected or not all(interface.up for interface in selected if interface):
        text = f"{_GLOO}={named}: no such interface is up and has an address"
        yield Finding("gloo interface", "problem", text, f"unset {_GLOO}, or one of {', '.join(by_name)}")
    else:
        yield Finding("gloo interface", "ok", f"{'; '.join(map(str, selected))}, by {_GLOO}")


def _matches(pattern: str, name: str) -> bool:
    excluded, exact = pattern.startswith("^"), pattern.lstrip("^").startswith("=")
    names = pattern.lstrip("^").removeprefix("=").split(",")
    return excluded != any(name == wanted if exact else name.startswith(wanted) for wanted in names)


def _suggestion(present: Iterable[Interface]) -> str:
    """Return the name of an interface that reaches other nodes."""
    return next((interface.name for interface in present if interface.up and not interface.is_loopback), "NAME")


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback
