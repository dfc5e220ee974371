"""Cluster files: YAML with the names of :mod:`megatron_wallfacer.planning.cluster`. Every mistake is one line."""

from __future__ import annotations

from dataclasses import MISSING, Field, fields, replace
from pathlib import Path
from typing import Any

from megatron_wallfacer.errors import OptionError, WallfacerError
from megatron_wallfacer.planning.cluster import Cluster, Device, Host, Level, Link, MessageCost
from megatron_wallfacer.planning.kernels import TABLES
from megatron_wallfacer.shipped import CONFIGS

#: Those that come with the plugin; another file is given by its path.
PRESETS = CONFIGS / "cluster"
#: Part of a GPU's name, and the preset whose devices and links are taken for a job on such GPUs. Where NVLink reaches
#: beyond a host, its ranks do not tell how far, and there is none.
GPUS = {"H200": "h200-8x8", "H100": "h100-8x8", "A100": "a100-8x8-ethernet"}
_SECTIONS: dict[str, type] = {"intra": Link, "inter": Link, "device": Device, "host": Host}
_TRANSPORTS = ("nccl", "gloo")


class ClusterError(WallfacerError):
    """A cluster file that cannot be used."""


def preset_names() -> tuple[str, ...]:
    """Clusters that need no path."""
    return tuple(sorted(path.stem for path in PRESETS.glob("*.yaml")))


def load_cluster(name: str | Path, nodes: int | None = None) -> Cluster:
    """Read a cluster.

    Args:
        name: of a preset, or a path.
        nodes: in place of those of the file.

    Raises:
        OptionError: there is no such file or preset.
        ClusterError: an entry is wrong.
    """
    import yaml

    path = Path(name)
    if not path.suffix and (PRESETS / f"{name}.yaml").is_file():
        path = PRESETS / f"{name}.yaml"
    if not path.is_file():
        raise OptionError("cluster", name, f"a file, or one of {', '.join(preset_names())}")
    try:
        data = yaml.safe_load(path.read_text())
        cluster = parse_cluster(data, path.stem)
    except yaml.YAMLError as error:
        raise ClusterError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    except ClusterError as error:
        raise ClusterError(f"{path}: {error}") from None
    if nodes is None:
        return cluster
    if nodes < 1:
        raise OptionError("nodes", nodes, "a positive number")
    return replace(cluster, nodes=nodes)


def cluster_of_gpus(gpu: str, nodes: int, gpus_per_node: int) -> Cluster:
    """The cluster that a job on such GPUs runs on, with usual figures for what it does not tell.

    Args:
        gpu: name of its devices.
        nodes: hosts of the job.
        gpus_per_node: ranks on each.

    Raises:
        OptionError: no preset is of such devices.
    """
    known = next((preset for part, preset in GPUS.items() if part in gpu), None)
    if known is None:
        raise OptionError("GPU", gpu, f"one of {', '.join(GPUS)}")
    usual = load_cluster(known)
    # A card each, or one for all: as in the preset.
    nics = max(1, usual.nics * gpus_per_node // usual.gpus_per_node)
    return replace(usual, name=f"{known}, hosts of the job", nodes=nodes, gpus_per_node=gpus_per_node, nics=nics)


def parse_cluster(data: Any, name: str) -> Cluster:
    """A cluster from the mapping that a file holds.

    Raises:
        ClusterError: naming the entry, its value and what is allowed.
    """
    entries = _mapping(data, "the file")
    if "host" in entries:
        host = _mapping(entries["host"], "host")
        messages = host.get("messages", [])
        if not isinstance(messages, list):
            raise ClusterError(f"host.messages={messages!r}: must be a list of {{size, thread_us, transport_us}}")
        built = _build_all(MessageCost, messages, "host.messages")
        entries["host"] = host | {"messages": tuple(sorted(built, key=lambda one: one.size))}
    for key, kind in _SECTIONS.items():
        if key in entries:
            entries[key] = _build(kind, entries[key], key)
    levels = entries.pop("levels", [])
    if not isinstance(levels, list):
        raise ClusterError(f"levels={levels!r}: must be a list of {{nodes, oversubscription}}")
    cluster = _build(Cluster, entries | {"name": name, "levels": _build_all(Level, levels, "levels")}, "")
    if cluster.transport not in _TRANSPORTS:
        raise ClusterError(f"transport={cluster.transport}: must be one of {', '.join(_TRANSPORTS)}")
    if cluster.nics < cluster.gpus_per_node and cluster.gpus_per_node % cluster.nics:
        raise ClusterError(f"nics={cluster.nics}: must divide gpus_per_node {cluster.gpus_per_node}, or be more")
    return cluster


def _build_all(kind: type, data: list, where: str) -> tuple[Any, ...]:
    """A dataclass from each mapping."""
    return tuple(_build(kind, one, f"{where}[{number}]") for number, one in enumerate(data))


def _mapping(data: Any, where: str) -> dict[str, Any]:
    if not isinstance(data, dict):
        raise ClusterError(f"{where}: must be a mapping, not {type(data).__name__}")
    return dict(data)


def _build(kind: type, data: Any, where: str) -> Any:
    """A dataclass from a mapping of its fields."""
    entries, known = _mapping(data, where), {one.name: one for one in fields(kind)}
    for key, value in entries.items():
        entry = f"{where}.{key}" if where else key
        if key not in known:
            raise ClusterError(f"{entry}: is not an entry that exists; there are {', '.join(known)}")
        _check(entry, value, known[key])
    for key, one in known.items():
        if key not in entries and one.default is MISSING and one.default_factory is MISSING:
            raise ClusterError(f"{f'{where}.{key}' if where else key}: is missing")
    return kind(**entries)


def _check(entry: str, value: Any, one: Field) -> None:
    """Numbers are positive (a latency or an overhead may be zero); what may be None may be."""
    wanted = str(one.type)
    if value is None and "None" in wanted:
        return
    if one.name == "kernels" and value not in TABLES:
        raise ClusterError(f"{entry}={value!r}: must be the name of measured kernels: {', '.join(TABLES)}")
    if wanted.startswith("int"):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ClusterError(f"{entry}={value!r}: must be a positive whole number")
    elif wanted.startswith("float"):
        may_be_zero = one.name.endswith(("_us", "_s_per_gbyte"))
        if not isinstance(value, int | float) or isinstance(value, bool) or value < 0 or not (value or may_be_zero):
            raise ClusterError(f"{entry}={value!r}: must be a positive number")
        if one.name in ("forward", "backward", "matmul") and value > 1:
            raise ClusterError(f"{entry}={value!r}: must be a part of the peak, at most 1")
