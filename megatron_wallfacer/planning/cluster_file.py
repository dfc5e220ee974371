"""Reader of cluster files, YAML with the fields of :mod:`megatron_wallfacer.planning.cluster`."""

from __future__ import annotations

from dataclasses import MISSING, Field, fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from megatron_wallfacer.errors import OptionError, WallfacerError
from megatron_wallfacer.input_files import read_yaml
from megatron_wallfacer.planning.cluster import Cluster, Device, HostProcessors, LinkSpeed, MessageCost, SwitchLevel
from megatron_wallfacer.planning.measured_kernels import TABLES
from megatron_wallfacer.shipped import CONFIGS

#: Folder of the cluster files in the package.
PRESETS = CONFIGS / "cluster"
#: Preset with the devices and links of a job, by a part of its GPU's name. GPUs whose NVLink connects nodes have no
#: preset, because the ranks of a job do not show which nodes NVLink connects.
GPUS = {"H200": "h200-8x8", "H100": "h100-8x8", "A100": "a100-8x8-ethernet"}
_SECTIONS: dict[str, type] = {"intra": LinkSpeed, "inter": LinkSpeed, "device": Device, "host": HostProcessors}
_TRANSPORTS = ("nccl", "gloo")
#: Limits of numbers. Larger numbers would give infinite seconds or an endless search.
_WHOLE = {"nodes": 100_000, "gpus_per_node": 1024, "nics": 1024}
_LEAST, _LARGEST = 1e-6, 1e15
_RANKS = 1 << 20


class ClusterError(WallfacerError):
    """An error in a cluster file. ``entry`` is the name of the invalid entry, or empty for the whole file."""

    def __init__(self, message: str, entry: str) -> None:
        super().__init__(message)
        self.entry = entry


def preset_names() -> tuple[str, ...]:
    """Return the names of the shipped cluster files."""
    return tuple(sorted(path.stem for path in PRESETS.glob("*.yaml")))


def load_cluster(name: str | Path, nodes: int | None = None) -> Cluster:
    """Load a cluster by the name of a shipped file or by the path of a file.

    ``nodes`` overrides the number of nodes in the file.

    Raises:
        OptionError: The file does not exist.
        WallfacerError: The file or an entry is invalid. The message has the line number.
    """
    path = Path(name)
    if not path.suffix and (PRESETS / f"{name}.yaml").is_file():
        path = PRESETS / f"{name}.yaml"
    if not path.is_file():
        raise OptionError("cluster", name, f"a file, or one of {', '.join(preset_names())}")
    file = read_yaml(path)
    try:
        cluster = parse_cluster(file.data, path.stem)
    except ClusterError as error:
        raise WallfacerError(f"{path}:{file.line(error.entry)}: {error}") from None
    if nodes is None:
        return cluster
    if nodes < 1:
        raise OptionError("nodes", nodes, "a positive number")
    return replace(cluster, nodes=nodes)


def part_of(cluster: Cluster, gpus_per_node: int | None, memory_gb: float | None) -> Cluster:
    """Return the cluster with fewer devices per node, with another size of the device memory, or with both.

    Args:
        cluster: modelled cluster.
        gpus_per_node: devices per node; None to leave the number unchanged.
        memory_gb: memory of each device in 1e9 bytes; None to leave it unchanged.

    Raises:
        OptionError: ``gpus_per_node`` is not positive, or larger than in the cluster; or ``memory_gb`` is not positive.
    """
    if gpus_per_node is not None:
        if not 1 <= gpus_per_node <= cluster.gpus_per_node:
            raise OptionError("gpus_per_node", gpus_per_node, f"from 1 to {cluster.gpus_per_node}")
        cluster = cluster.with_gpus_per_node(gpus_per_node)
    if memory_gb is None:
        return cluster
    if not memory_gb > 0:
        raise OptionError("memory", f"{memory_gb:g}", "a positive number of GB")
    return replace(cluster, device=replace(cluster.device, memory_gb=memory_gb))


def cluster_of_gpus(gpu: str, nodes: int, gpus_per_node: int) -> Cluster:
    """Return a cluster with ``nodes`` nodes for a GPU name.

    A file in ``configs/cluster`` gives the links and the number of NICs per device.

    Raises:
        OptionError: No shipped cluster file has these GPUs.
    """
    preset = next((preset for part, preset in GPUS.items() if part in gpu), None)
    if preset is None:
        raise OptionError("GPU", gpu, f"one of {', '.join(GPUS)}")
    cluster = load_cluster(preset).with_gpus_per_node(gpus_per_node)
    return replace(cluster, name=f"{preset}, hosts of the job", nodes=nodes)


def parse_cluster(data: Any, name: str) -> Cluster:
    """Return the cluster that the content of a YAML file describes.

    Raises:
        ClusterError: An entry is invalid.
    """
    entries = _mapping(data, "")
    if "host" in entries:
        host = _mapping(entries["host"], "host")
        messages = host.get("messages", [])
        if not isinstance(messages, list):
            raise ClusterError(
                f"host.messages={_short(messages)}: must be a list of {{size, thread_us, transport_us}}",
                "host.messages",
            )
        entries["host"] = host | {"messages": _ascending(_build_all(MessageCost, messages, "host.messages"))}
    for key, kind in _SECTIONS.items():
        if key in entries:
            entries[key] = _build(kind, entries[key], key)
    levels = entries.pop("levels", [])
    if not isinstance(levels, list):
        raise ClusterError(f"levels={_short(levels)}: must be a list of {{nodes, oversubscription}}", "levels")
    cluster = _build(Cluster, entries | {"name": name, "levels": _build_all(SwitchLevel, levels, "levels")}, "")
    ranks, per_node, nics = cluster.ranks, cluster.gpus_per_node, cluster.nics
    if ranks > _RANKS:
        raise ClusterError(f"nodes={cluster.nodes}: must be fewer: {ranks} ranks exceed the limit {_RANKS}", "nodes")
    if nics < per_node and per_node % nics:
        raise ClusterError(f"nics={nics}: must divide gpus_per_node {per_node}, or be more", "nics")
    return cluster


def _build_all(kind: type, data: list, where: str) -> tuple[Any, ...]:
    return tuple(_build(kind, entries, f"{where}[{number}]") for number, entries in enumerate(data))


def _mapping(data: Any, where: str) -> dict[str, Any]:
    if not isinstance(data, dict):
        raise ClusterError(f"{where or 'the file'}: must be a mapping, not {type(data).__name__}", where)
    return dict(data)


def _build(kind: type, data: Any, where: str) -> Any:
    entries, allowed = _mapping(data, where), {field.name: field for field in fields(kind)}
    prefix = f"{where}." if where else ""
    for key, value in entries.items():
        entry = f"{prefix}{key}"
        if key not in allowed:
            shown = _short(entry, quote=False)
            raise ClusterError(f"{shown}: is not an entry; use one of {', '.join(allowed)}", entry)
        _check(entry, value, allowed[key])
    for key, field in allowed.items():
        if key not in entries and field.default is MISSING:
            raise ClusterError(f"{prefix}{key}: is missing", f"{prefix}{key}")
    return kind(**entries)


def _check(entry: str, value: Any, field: Field) -> None:
    """Check one entry. Numbers are positive; a latency or an overhead may be zero. Optional entries may be None."""
    kind, name = str(field.type), field.name
    if value is None and "None" in kind:
        return
    if name == "kernels":
        if not isinstance(value, str) or value not in TABLES:
            names = ", ".join(TABLES)
            raise ClusterError(f"{entry}={_short(value)}: must be one of the measured kernels: {names}", entry)
    elif name == "transport":
        if not isinstance(value, str) or value not in _TRANSPORTS:
            shown = _short(value, quote=False)
            raise ClusterError(f"transport={shown}: must be one of {', '.join(_TRANSPORTS)}", entry)
    elif kind.startswith("int"):
        _check_whole(entry, value, _WHOLE[name])
    elif kind.startswith("float"):
        _check_number(entry, value, may_be_zero=name.endswith(("_us", "_s_per_gbyte")))
        if name in ("forward", "backward", "matmul") and value > 1:
            raise ClusterError(f"{entry}={value!r}: must be a part of the peak, at most 1", entry)


def _check_whole(entry: str, value: Any, largest: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ClusterError(f"{entry}={_short(value)}: must be a positive whole number", entry)
    if value > largest:
        raise ClusterError(f"{entry}={_short(value)}: must be at most {largest}", entry)


def _check_number(entry: str, value: Any, *, may_be_zero: bool) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not value >= 0 or not (value or may_be_zero):
        raise ClusterError(f"{entry}={_short(value)}: must be a positive number", entry)
    if value > _LARGEST or 0 < value < _LEAST:
        raise ClusterError(f"{entry}={_short(value)}: must be from {_LEAST:g} to {_LARGEST:g}", entry)


def _ascending(messages: tuple[MessageCost, ...]) -> tuple[MessageCost, ...]:
    """Return messages by ascending size.

    Raises:
        ClusterError: The largest message costs less than the second largest, so extrapolated costs would become
            negative.
    """
    ordered = tuple(sorted(messages, key=lambda message: message.size))
    for below, above in pairwise(ordered[-2:]):
        if above.thread_us < below.thread_us or above.transport_us < below.transport_us:
            raise ClusterError(
                "host.messages: the largest message must not cost less than the second largest", "host.messages"
            )
    return ordered


def _short(value: Any, *, quote: bool = True) -> str:
    """Return a value as text on one line of at most 80 characters."""
    try:
        text = repr(value) if quote else " ".join(str(value).split())
    except ValueError:  # Python does not print an integer of more than 4,300 digits
        text = "a number of too many digits"
    return text if len(text) <= 80 else f"{text[:77]}..."
