"""After the model is built, ranks that hold the same layer compare what its attention computes.

The key is the layer's number in the whole model, or its depth in multi-token prediction: with pipeline stages, virtual
ones too, only some ranks hold a layer, and only those compare it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from datetime import timedelta

import torch.distributed as dist
from torch import nn

from megatron_wallfacer.engine.agreement.compare import Verdict, difference, ranks_text
from megatron_wallfacer.engine.agreement.exchange import Exchange
from megatron_wallfacer.errors import DisagreementError
from megatron_wallfacer.megatron.core_attention import WallfacerCoreAttention
from megatron_wallfacer.megatron.layer_selection import is_megatrons

#: Multi-token prediction numbers its layers from 1, like the decoder.
_MTP = re.compile(r"(?:^|\.)mtp\.layers\.(\d+)\.")


@dataclass(frozen=True)
class HeldLayers:
    """The attention layers of one rank.

    Attributes:
        cp_ranks: ranks of its context-parallel group.
        layers: what each layer computes, value by name, by the name of the layer.
    """

    cp_ranks: tuple[int, ...]
    layers: Mapping[str, Mapping[str, str]]

    def to_text(self) -> str:
        """Return the layers as JSON."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_text(cls, text: str) -> HeldLayers:
        """Return the layers of :meth:`to_text`."""
        values = json.loads(text)
        return cls(tuple(values["cp_ranks"]), values["layers"])


def layers_of(model: Iterable[nn.Module]) -> dict[str, dict[str, str]]:
    """Return what each attention layer of a rank's model chunks computes.

    Args:
        model: the chunks; with virtual pipeline stages there are several.
    """
    found: dict[str, dict[str, str]] = {}
    for chunk in model:
        for path, module in chunk.named_modules():
            depth = _mtp_depth(path)
            place = f"{depth}, " if depth else ""
            if isinstance(module, WallfacerCoreAttention):
                found[f"{place}layer {module.layer_number}"] = module.described()
            elif is_megatrons(module):
                number = getattr(module, "layer_number", path)
                found[f"{place}layer {number}"] = {"attention": type(module).__name__}
    return found


def name_mtp_layers(model: Iterable[nn.Module]) -> None:
    """Name the attention layers of multi-token prediction, so that messages tell them from those of the decoder.

    Args:
        model: the chunks; with virtual pipeline stages there are several.
    """
    for chunk in model:
        for path, module in chunk.named_modules():
            depth = _mtp_depth(path)
            if depth and isinstance(module, WallfacerCoreAttention):
                module.name_layer(depth)


def _mtp_depth(path: str) -> str:
    """``MTP depth 1`` for a module of multi-token prediction, else nothing."""
    found = _MTP.search(f"{path}.")
    return f"MTP depth {int(found[1]) + 1}" if found else ""


def compare_layers(records: Mapping[int, HeldLayers]) -> Verdict:
    """Compare the layers of ranks: a layer is the same wherever it is held, and a context-parallel group holds one set.

    Args:
        records: layers by rank.
    """
    holders: dict[str, list[int]] = {}
    groups: dict[tuple[int, ...], list[int]] = {}
    for rank, record in sorted(records.items()):
        groups.setdefault(record.cp_ranks, []).append(rank)
        for layer in record.layers:
            holders.setdefault(layer, []).append(rank)
    errors = []
    for layer, ranks in holders.items():
        names = dict.fromkeys(name for rank in ranks for name in records[rank].layers[layer])
        lines = (difference(name, {rank: records[rank].layers[layer].get(name) for rank in ranks}) for name in names)
        errors += [f"{layer}: {line}" for line in lines if line is not None]
    for cp_ranks, ranks in groups.items():
        names = dict.fromkeys(layer for rank in ranks for layer in records[rank].layers)
        lines = (difference(layer, {r: "" if layer in records[r].layers else None for r in ranks}) for layer in names)
        errors += [f"context-parallel group of {ranks_text(cp_ranks)}: {line}" for line in lines if line is not None]
    return Verdict(tuple(errors))


def check_model(model: Iterable[nn.Module], cp_group: dist.ProcessGroup, timeout: timedelta, number: int) -> None:
    """Compare this rank's layers with those of all ranks.

    Args:
        model: the rank's model chunks.
        cp_group: its context-parallel group.
        timeout: of process groups.
        number: of the model that this process has built, from 1.

    Raises:
        DisagreementError: a layer differs between ranks, the same lines on every rank.
    """
    keys = dist.PrefixStore(f"wallfacer/layers/{number}", dist.distributed_c10d._get_default_store())
    record = HeldLayers(tuple(dist.get_process_group_ranks(cp_group)), layers_of(model))
    exchange = Exchange(keys, range(dist.get_world_size()), dist.get_rank(), timeout, "have not built the model")
    verdict = exchange.run(record.to_text(), HeldLayers.from_text, compare_layers)
    if verdict.errors:
        raise DisagreementError(verdict.errors)
