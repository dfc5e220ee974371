"""Trains like scripts/pretrain_gpt.py, but ranks have unequal numbers of unmasked tokens; keeps the first gradients.

`GRADIENTS` names a folder: each rank writes the reduced gradient of every parameter of the first step there. `BATCHES`
chooses batches: none (the data's own), `few` or `padded`.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from functools import partial
from itertools import count, pairwise
from pathlib import Path
from types import ModuleType

import torch
import torch.distributed as dist
from megatron.core import mpu
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.training import training

from megatron_wallfacer.megatron.any_device.thd import partitioned_indices
from tests.support.conversations_training import SCRIPT, read_conversations_alone

GRADIENTS, BATCHES = "GRADIENTS", "BATCHES"
#: Documents, and their lengths with padding to 2P tokens for P = 2. Without context parallelism there is no padding.
DOCUMENTS, PADDED = (0, 10, 28, 58), (0, 12, 32, 64)
WORDS = 29


def keep_first_gradients(folder: Path) -> None:
    """Write them to a file of this rank, by model chunk and parameter."""
    finalize = training.finalize_model_grads

    def finalize_and_keep(model: list[torch.nn.Module], *args: object, **kwargs: object) -> None:
        finalize(model, *args, **kwargs)
        file = folder / f"{dist.get_rank()}.pt"
        if not file.exists():
            named = ((i, pair) for i, chunk in enumerate(model) for pair in chunk.named_parameters())
            torch.save({f"{i}.{name}": parameter.main_grad.clone() for i, (name, parameter) in named}, file)

    training.finalize_model_grads = finalize_and_keep


def with_few_tokens(reduce: Callable[..., dict], batch: dict, **kwargs: object) -> dict:
    """Mask all but the first three tokens of some sequences, and all but an uneven pattern of the others."""
    mask = batch["loss_mask"]
    if mask is not None:
        place = torch.arange(mask.shape[-1]).expand_as(mask)
        few = (batch["labels"].sum(-1, keepdim=True) % 2 == 0).expand_as(mask)
        kept = torch.where(few, place < 3, (place % 5 == 0) & (place < mask.shape[-1] * 5 // 8))
        batch["loss_mask"] = mask * kept
    return reduce(batch, **kwargs)


def padded_batch(numbers: count, *_: object) -> dict[str, torch.Tensor]:
    """This rank's part of the next batch of documents, each padded where the ranks are more than one."""
    drawn = torch.randint(WORDS, (DOCUMENTS[-1] + 1,), generator=torch.Generator().manual_seed(next(numbers)))
    fields = {"tokens": drawn[:-1], "labels": drawn[1:], "loss_mask": torch.ones(DOCUMENTS[-1])}
    lengths = [b - a for a, b in pairwise(DOCUMENTS)]
    fields["position_ids"] = torch.cat([torch.arange(length) for length in lengths])
    fields["loss_mask"][[end - 1 for end in DOCUMENTS[1:]]] = 0
    ranks, rank = mpu.get_context_parallel_world_size(), mpu.get_context_parallel_rank()
    if ranks > 1:
        place = torch.cat([torch.arange(length) + start for length, start in zip(lengths, PADDED, strict=False)])
        mine = partitioned_indices(torch.tensor(PADDED), PADDED[-1], ranks, rank)
        for name, field in fields.items():
            padded = torch.zeros(PADDED[-1], dtype=field.dtype)
            padded[place] = field
            fields[name] = padded[mine]
    return {name: field[None] for name, field in fields.items()} | {"attention_mask": None}


def padded_packing(_: dict) -> PackedSeqParams:
    """Boundaries of documents without padding, and their padded twins where there is padding."""
    ends = torch.tensor(DOCUMENTS, dtype=torch.int32)
    padded = torch.tensor(PADDED, dtype=torch.int32) if mpu.get_context_parallel_world_size() > 1 else None
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=ends,
        cu_seqlens_kv=ends,
        cu_seqlens_q_padded=padded,
        cu_seqlens_kv_padded=padded,
        max_seqlen_q=32,
        max_seqlen_kv=32,
    )


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("pretrain_gpt", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main() -> None:
    read_conversations_alone()
    script, batches = load_script(), os.environ.get(BATCHES)
    if folder := os.environ.get(GRADIENTS):
        keep_first_gradients(Path(folder))
    if batches == "few":
        script.get_batch_on_this_cp_rank = partial(with_few_tokens, script.get_batch_on_this_cp_rank)
    elif batches == "padded":
        script.batch_on_this_rank, script.packing_of = partial(padded_batch, count()), padded_packing
    script.main()


if __name__ == "__main__":
    main()
