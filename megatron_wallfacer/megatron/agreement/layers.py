"""Compare the attention layers of all ranks after the model is built.

A layer is identified by its number in the whole model or by its depth in multi-token prediction (MTP). With pipeline
stages, the properties of a layer are compared between the ranks that have the layer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import NamedTuple

import torch.distributed as dist
from torch import nn

from megatron_wallfacer.engine.agreement.compare import Verdict, difference, ranks_text
from megatron_wallfacer.engine.agreement.exchange import Exchange
from megatron_wallfacer.errors import DisagreementError
from megatron_wallfacer.megatron.core_attention import WallfacerCoreAttention
from megatron_wallfacer.megatron.layer_selection import is_megatrons

#: Path of a module in an MTP layer. MTP layers have numbers from 1, like decoder layers.
_MTP = re.compile(r"(?:^|\.)mtp\.layers\.(\d+)\.")


class HeldLayers(NamedTuple):
    """Attention layers of one rank.

    Attributes:
        cp_ranks: global ranks of the rank's context-parallel group.
        layers: the values that ranks compare, as ``layers[layer name][property name]``.
    """

    cp_ranks: Sequence[int]
    layers: Mapping[str, Mapping[str, str]]


def layers_of(model: Iterable[nn.Module]) -> dict[str, dict[str, str]]:
    """Return, for each attention layer of this rank, the properties that ranks compare, keyed by the layer's name."""
    found: dict[str, dict[str, str]] = {}
    for path, depth, module in _modules(model):
        place = f"{depth}, " if depth else ""
        if isinstance(module, WallfacerCoreAttention):
            found[f"{place}layer {module.layer_number}"] = module.described()
        elif is_megatrons(module):
            number = getattr(module, "layer_number", path)
            found[f"{place}layer {number}"] = {"attention": type(module).__name__}
    return found


def name_mtp_layers(model: Iterable[nn.Module]) -> None:
    """Name attention layers of multi-token prediction, so that messages distinguish them from decoder layers."""
    for _, depth, module in _modules(model):
        if depth and isinstance(module, WallfacerCoreAttention):
            module.name_layer(depth)


def _modules(model: Iterable[nn.Module]) -> Iterator[tuple[str, str, nn.Module]]:
    """Yield (path, depth, module) for each module. ``depth`` is text such as ``MTP depth 1``, empty outside MTP."""
    for path, module in (item for chunk in model for item in chunk.named_modules()):
        mtp = _MTP.search(f"{path}.")
        yield path, f"MTP depth {int(mtp[1]) + 1}" if mtp else "", module


def compare_layers(records: Mapping[int, HeldLayers]) -> Verdict:
    """Compare the layers of all ranks.

    A layer must have the same properties on all ranks that have the layer. The ranks of a context-parallel group must
    have the same layers.
    """
    holders: dict[str, list[int]] = {}
    groups: dict[tuple[int, ...], list[int]] = {}
    for rank, record in sorted(records.items()):
        groups.setdefault(tuple(record.cp_ranks), []).append(rank)
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
    """Compare the layers of this rank's model chunks with the layers of all ranks.

    ``timeout`` is the timeout of process groups. ``number`` counts the models that the process has built, from 1.

    Raises:
        DisagreementError: A layer differs between ranks. All ranks raise the same error.
    """
    keys = dist.PrefixStore(f"wallfacer/layers/{number}", dist.distributed_c10d._get_default_store())
    record = HeldLayers(dist.get_process_group_ranks(cp_group), layers_of(model))
    exchange = Exchange(keys, range(dist.get_world_size()), dist.get_rank(), timeout, "have not built the model")
    text = json.dumps(record, sort_keys=True)
    verdict = exchange.run(text, lambda text: HeldLayers(*json.loads(text)), compare_layers)
    if verdict.errors:
        raise DisagreementError(verdict.errors)
