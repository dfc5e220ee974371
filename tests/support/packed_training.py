"""Trains like scripts/pretrain_gpt.py, but knows packed sequences, as pretrain_gpt.py of a Megatron-LM checkout does.

Batches are made, cut and described by Megatron's own functions: with --dataloader-inter-document-masking the whole
sequence is cut over the context-parallel ranks, with --sft each document.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import ModuleType

import torch
from megatron.core import mpu
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.utils import (
    flatten_batch_for_packed_sequences,
    get_batch_on_this_cp_rank,
    get_batch_on_this_tp_rank,
)
from megatron.training import get_args

FIELDS = ("tokens", "labels", "loss_mask", "position_ids", "cu_seqlens", "cu_seqlens_padded", "max_seqlen")
#: Of pretrain_gpt.py 0.19, which hands on one tensor of boundaries for queries and keys.
SIDES = ("q", "kv")


def plain_script() -> ModuleType:
    """scripts/pretrain_gpt.py, not run yet, and willing to take packed sequences."""
    path = Path(__file__).resolve().parents[2] / "scripts" / "pretrain_gpt.py"
    spec = importlib.util.spec_from_file_location("plain_pretrain_gpt", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.UNSUPPORTED = ()
    return module


def packed_batch(samples: Iterator[dict[str, torch.Tensor]]) -> tuple[dict[str, torch.Tensor], PackedSeqParams]:
    """This rank's tokens of the next batch, ``[1, tokens / P]``, and where its documents end."""
    args = get_args()
    tp_rank, batch = mpu.get_tensor_model_parallel_rank(), {}
    if tp_rank == 0:
        sample = next(samples)
        batch = {name: sample.get(name) for name in FIELDS}
    batch = get_batch_on_this_tp_rank(
        batch,
        has_cu_seqlens=True,
        is_hybrid_cp=False,
        create_attention_mask_in_dataloader=False,
        broadcast_src_rank=mpu.get_tensor_model_parallel_src_rank(),
        broadcast_group=mpu.get_tensor_model_parallel_group(),
        cp_size=args.context_parallel_size,
        tp_rank=tp_rank,
        micro_batch_size=args.micro_batch_size,
        seq_length=args.seq_length,
        mtp_on_this_rank=False,
        pipeline_model_parallel_size=1,
        is_pipeline_first_stage=True,
        is_pipeline_last_stage=True,
    )
    batch = get_batch_on_this_cp_rank(
        flatten_batch_for_packed_sequences(batch),
        is_hybrid_cp=False,
        cp_group=mpu.get_context_parallel_group(),
        use_per_sequence_balancing=args.dataloader_inter_document_masking and not args.sft,
    )
    boundaries, longest = batch["cu_seqlens"].squeeze(0), int(batch["max_seqlen"].item())
    packed = {f"cu_seqlens_{side}": boundaries for side in SIDES} | {f"max_seqlen_{side}": longest for side in SIDES}
    return batch, PackedSeqParams(qkv_format="thd", **packed)


def conversations() -> type:
    """Megatron's SFT data set, reading its jsonl file without the `datasets` package, which is not installed here."""
    from megatron.training.datasets import sft_dataset

    class Lines:
        def __init__(self, path: str) -> None:
            self._lines = [json.loads(line)["messages"] for line in Path(path).read_text().splitlines()]

        def __len__(self) -> int:
            return len(self._lines)

        def __getitem__(self, index: int) -> list:
            return self._lines[index]

    sft_dataset.SFTLowLevelDataset = Lines
    return sft_dataset.SFTDataset


def main() -> None:
    """Train."""
    script = plain_script()

    def forward_step(samples: Iterator[dict[str, torch.Tensor]], model: torch.nn.Module) -> tuple:
        batch, packed = packed_batch(samples)
        output = model(
            batch["tokens"],
            batch["position_ids"],
            None,
            labels=batch["labels"],
            loss_mask=batch["loss_mask"],
            packed_seq_params=packed,
        )
        return output, partial(script.masked_loss, batch["loss_mask"])

    def config(**settings: object) -> object:
        return dataset_config(**settings, inter_document_masking=get_args().dataloader_inter_document_masking)

    dataset_config = script.GPTDatasetConfig
    script.forward_step, script.GPTDatasetConfig = forward_step, config
    if "--sft" in sys.argv:
        script.GPTDataset = conversations()
    script.main()


if __name__ == "__main__":
    main()
