"""One setting of a measurement, from YAML. Every mistake in the file is one line that names the entry."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from benchmarks.cluster.topology import Topology
from megatron_wallfacer.errors import WallfacerError
from megatron_wallfacer.input_files import read_yaml
from megatron_wallfacer.schedule.volume import Shape as VolumeShape

#: Bytes of an element, by the dtypes that a setting may have.
ITEMSIZES = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8}
DTYPES: tuple[str, ...] = tuple(ITEMSIZES)
MODES: tuple[str, ...] = ("sleep", "real")
_MAX_RANKS = 200
_REQUIRED = object()


#: Of a rate: beyond them seconds are infinite.
_LEAST, _LARGEST = 1e-6, 1e15


class ConfigError(WallfacerError):
    """A configuration file that cannot be used.

    Args:
        message: entry, value, what is allowed.
        entry: name of the entry that is wrong; "" for the file.
    """

    def __init__(self, message: str, entry: str = "") -> None:
        super().__init__(message)
        self.entry = entry


@dataclass(frozen=True)
class Shape:
    """One attention layer, causal, batch 1.

    Attributes:
        tokens: of the whole sequence.
        heads, kv_heads, head_dim: as in the model.
        dtype: of q, k, v.
    """

    tokens: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: str = "float32"


@dataclass(frozen=True)
class Compute:
    """What stands for the attention kernel.

    Attributes:
        mode: ``sleep`` for the modelled time, ``real`` for PyTorch's CPU flash attention.
        gflops_per_rank: rate of the model, 1e9 floating-point operations a second and rank.
    """

    mode: Literal["sleep", "real"] = "sleep"
    gflops_per_rank: float = 10.6


@dataclass(frozen=True)
class Config:
    """A setting.

    Attributes:
        name: names the output.
        schemes: more schemes than the built-in table has: arguments of ``make_plan`` by label.
    """

    name: str
    topology: Topology
    shape: Shape
    compute: Compute
    schemes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def shard(self) -> VolumeShape:
        """What one rank has."""
        shape, itemsize = self.shape, ITEMSIZES[self.shape.dtype]
        return VolumeShape(
            tokens=shape.tokens // self.topology.ranks,
            q_heads=shape.heads,
            kv_heads=shape.kv_heads,
            head_dim=shape.head_dim,
            itemsize=itemsize,
            accumulate_itemsize=max(4, itemsize),
        )


def load_config(path: Path) -> Config:
    """Read a setting.

    Raises:
        WallfacerError: the file or an entry is wrong; with the line.
    """
    file = read_yaml(path)
    try:
        return parse_config(file.data, path.stem)
    except ConfigError as error:
        raise ConfigError(f"{path}:{file.line(error.entry)}: {error}", error.entry) from None


def parse_config(data: Any, name: str) -> Config:
    """A setting from the mapping that a file holds."""
    entries = _Entries("", data)
    topology, shape = _topology(entries.section("topology")), _shape(entries.section("shape"))
    compute = _compute(entries.section("compute"))
    schemes = entries.take("schemes", {}, dict)
    for label, arguments in schemes.items():
        if not isinstance(arguments, dict) or "scheme" not in arguments:
            raise ConfigError(
                f"schemes.{label}: must be a mapping with the arguments of make_plan, scheme among them",
                f"schemes.{label}",
            )
    entries.finish()
    if shape.tokens % (2 * topology.ranks):
        raise ConfigError(
            f"shape.tokens={shape.tokens}: must be a multiple of 2 x {topology.ranks} ranks", "shape.tokens"
        )
    return Config(name, topology, shape, compute, schemes)


def _topology(entries: _Entries) -> Topology:
    topology = Topology(
        nodes=entries.positive("nodes"),
        ranks_per_node=entries.positive("ranks_per_node"),
        nic=entries.choice("nic", ("rank", "node"), "rank"),
        inter_mbit=entries.rate("inter_mbit"),
        intra_mbit=entries.rate("intra_mbit"),
    )
    entries.finish()
    if not 2 <= topology.ranks <= _MAX_RANKS:
        raise ConfigError(f"topology: {topology.ranks} ranks: must be 2 to {_MAX_RANKS}", "topology")
    return topology


def _shape(entries: _Entries) -> Shape:
    shape = Shape(
        tokens=entries.positive("tokens"),
        heads=entries.positive("heads"),
        kv_heads=entries.positive("kv_heads"),
        head_dim=entries.positive("head_dim"),
        dtype=entries.choice("dtype", DTYPES, "float32"),
    )
    entries.finish()
    if shape.heads % shape.kv_heads:
        raise ConfigError(f"shape.kv_heads={shape.kv_heads}: must divide heads {shape.heads}", "shape.kv_heads")
    return shape


def _compute(entries: _Entries) -> Compute:
    rate = entries.take("gflops_per_rank", 10.6, (int, float))
    if not _LEAST <= rate <= _LARGEST:
        raise entries.error("gflops_per_rank", f"={rate!s:.40}: must be positive, from {_LEAST:g} to {_LARGEST:g}")
    compute = Compute(entries.choice("mode", MODES, "sleep"), float(rate))
    entries.finish()
    return compute


class _Entries:
    """A mapping of the file, whose entries are taken one by one; what is left over is a mistake."""

    def __init__(self, name: str, data: Any) -> None:
        if not isinstance(data, dict):
            raise ConfigError(f"{name or 'the file'}: must be a mapping, not {type(data).__name__}", name)
        self._name, self._data = name, dict(data)

    def path(self, key: str) -> str:
        return f"{self._name}.{key}" if self._name else key

    def section(self, key: str) -> _Entries:
        return _Entries(self.path(key), self.take(key, _REQUIRED, dict))

    def take(self, key: str, default: Any, kind: type | tuple[type, ...]) -> Any:
        value = self._data.pop(key, default)
        if value is _REQUIRED:
            raise self.error(key, ": is missing")
        if not isinstance(value, kind) or isinstance(value, bool):
            names = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
            raise self.error(key, f"={value!r:.60}: must be {names}")
        return value

    def positive(self, key: str) -> int:
        value = self.take(key, _REQUIRED, int)
        if not 1 <= value <= _LARGEST:
            raise self.error(key, f"={value!r:.20}: must be positive, at most {_LARGEST:g}")
        return value

    def choice(self, key: str, allowed: tuple[str, ...], default: str) -> Any:
        value = self.take(key, default, str)
        if value not in allowed:
            raise self.error(key, f"={value}: must be one of {', '.join(allowed)}")
        return value

    def rate(self, key: str) -> float | None:
        value = self.take(key, _REQUIRED, (int, float, str))
        if value == "unlimited":
            return None
        if isinstance(value, str) or not _LEAST <= value <= _LARGEST:
            allowed = f"a positive number of Mbit/s, from {_LEAST:g} to {_LARGEST:g}, or unlimited"
            raise self.error(key, f"={value!s:.40}: must be {allowed}")
        return float(value)

    def finish(self) -> None:
        if self._data:
            raise self.error(str(next(iter(self._data))), ": is not an entry that exists")

    def error(self, key: str, rest: str) -> ConfigError:
        return ConfigError(" ".join(f"{self.path(key)}{rest}".split()), self.path(key))
