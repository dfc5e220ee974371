"""Pretrains a GPT model with nothing but the `megatron-core` wheel (0.19 or newer).

The wheel carries Megatron's training loop (`megatron.training`) and no entry script. This is one: Megatron's own
arguments, model builder, data sets and loop, and between them only what a script has to bring: batch, loss, data sets.
Packed documents (--dataloader-inter-document-masking), conversations (--sft) and extra layers (--mtp-num-layers) too.

    torchrun --nproc-per-node 8 -m megatron_wallfacer scripts/pretrain_gpt.py <Megatron's arguments>

On a machine with GPUs it runs as well without the plugin (`torchrun ... scripts/pretrain_gpt.py`). People who have a
Megatron-LM checkout use its `pretrain_gpt.py` instead, which also knows fill-in-the-middle and distillation; this
script stops when asked for what it does not know.
"""

from __future__ import annotations

import time

# ruff: noqa: E402 - the imports take seconds that belong to the run
PROGRAM_START = time.time()

import os
import sys
import warnings
from collections.abc import Iterator
from functools import partial

if os.environ.get("RANK", "0") != "0":
    warnings.simplefilter("ignore")  # what Megatron and torch have to say at import, rank 0 says

from megatron.core import package_info

if (package_info.MAJOR, package_info.MINOR) < (0, 19):
    sys.exit(
        f"pretrain_gpt.py: error: this script needs megatron-core 0.19 or newer, found {package_info.__version__}; "
        "with an older one run pretrain_gpt.py of a Megatron-LM checkout"
    )

import torch
from megatron.core import mpu
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.enums import ModelType
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
from megatron.core.utils import (
    flatten_batch_for_packed_sequences,
    get_attr_wrapped_model,
    get_batch_on_this_cp_rank,
    get_batch_on_this_tp_rank,
)
from megatron.training import get_args, get_timers, pretrain
from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
from megatron.training.arguments import parse_and_validate_args
from megatron.training.datasets.sft_dataset import SFTDataset
from megatron.training.training import set_startup_timestamps, update_seqlen_stats_from_cu_seqlens
from megatron.training.utils import get_blend_and_blend_per_split, is_first_or_last_pipeline_stage

Batch = dict[str, torch.Tensor | None]
TOKENS = ("tokens", "labels", "loss_mask", "position_ids", "attention_mask")
DOCUMENTS = ("cu_seqlens", "cu_seqlens_padded", "max_seqlen")
# Flags of Megatron's parser that its own pretrain_gpt.py implements and this script does not.
UNSUPPORTED = ("fim_data", "hybrid_context_parallel", "logits_load_dir")


def batch_on_this_rank(samples: Iterator[dict[str, torch.Tensor]] | None, vp_stage: int | None) -> Batch:
    """This rank's part of the next micro-batch.

    Only the first rank of a tensor-parallel group reads data; it broadcasts to the others, then each context-parallel
    rank keeps its two chunks of the sequence, or of each document with --sft. Where documents are packed the sequences
    of a micro-batch follow each other in one, and every pipeline stage is told where documents end.

    Returns:
        `TOKENS` -> `[micro_batch, seq_length / context_parallel_size]` (attention_mask: `[micro_batch, 1, that,
        seq_length]`), or None where this pipeline stage does not use the field; `DOCUMENTS` -> `[1, documents + 1]`
        (max_seqlen: `[1]`), or None.
    """
    args, reads_tokens = get_args(), is_first_or_last_pipeline_stage(vp_stage)
    if not (reads_tokens or packs_documents()):
        return dict.fromkeys((*TOKENS, *DOCUMENTS))
    tp_rank = mpu.get_tensor_model_parallel_rank()
    batch: Batch = {}
    if tp_rank == 0:
        sample = next(samples)
        given = {name: sample.get(name) for name in (*TOKENS, *DOCUMENTS)}
        batch = {name: None if field is None else field.cuda(non_blocking=True) for name, field in given.items()}
    batch = get_batch_on_this_tp_rank(
        batch,
        has_cu_seqlens=packs_documents(),
        is_hybrid_cp=False,
        create_attention_mask_in_dataloader=args.create_attention_mask_in_dataloader,
        broadcast_src_rank=mpu.get_tensor_model_parallel_src_rank(),
        broadcast_group=mpu.get_tensor_model_parallel_group(),
        cp_size=args.context_parallel_size,
        tp_rank=tp_rank,
        micro_batch_size=args.micro_batch_size,
        seq_length=args.seq_length,
        # Extra layers are on the last stage and read its tokens again.
        mtp_on_this_rank=bool(args.mtp_num_layers) and mpu.is_pipeline_last_stage(),
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        is_pipeline_first_stage=mpu.is_pipeline_first_stage(),
        is_pipeline_last_stage=mpu.is_pipeline_last_stage(),
    )
    batch = flatten_batch_for_packed_sequences(batch)
    if not reads_tokens:
        return dict.fromkeys(TOKENS) | {name: batch[name] for name in DOCUMENTS}
    return get_batch_on_this_cp_rank(
        batch,
        is_hybrid_cp=False,
        cp_group=mpu.get_context_parallel_group(),
        use_per_sequence_balancing=args.dataloader_inter_document_masking and not args.sft,
    )


def packs_documents() -> bool:
    """Whether a sequence holds documents that do not see each other."""
    return get_args().sft or get_args().dataloader_inter_document_masking


def packing_of(batch: Batch) -> PackedSeqParams | None:
    """Where the documents of a batch end, as attention is told; None where there are none."""
    if batch.get("cu_seqlens") is None:
        return None
    ends, padded = (None if batch[name] is None else batch[name].squeeze(0) for name in DOCUMENTS[:2])
    update_seqlen_stats_from_cu_seqlens(ends)  # Megatron counts FLOPs by it
    ends, longest = ends if padded is None else padded, int(batch["max_seqlen"].item())
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=ends,
        cu_seqlens_kv=ends,
        cu_seqlens_q_padded=padded,
        cu_seqlens_kv_padded=padded,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        tokens_per_sample=get_args().seq_length,
    )


def masked_loss(loss_mask: torch.Tensor, losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict]:
    """Sum of the token losses that count, on this rank; Megatron divides and reduces.

    Args:
        loss_mask: 1 where the token counts, `[micro_batch, tokens]`.
        losses: Cross entropy of each token, same shape.

    Returns:
        Loss sum, number of tokens that count (int), and what is to be logged: both, in one tensor.
    """
    mask = loss_mask.flatten().float()
    loss = torch.dot(losses.flatten().float(), mask)
    count = mask.sum().to(torch.int)
    return loss, count, {"lm loss": torch.stack([loss.detach(), count.to(loss.dtype)])}


def forward_step(
    samples: Iterator[dict[str, torch.Tensor]] | None, model: torch.nn.Module
) -> tuple[torch.Tensor, partial]:
    """One micro-batch forward.

    Returns:
        The model's output (token losses on the last pipeline stage, else activations), and the loss function that
        Megatron shall apply to it.
    """
    timer = get_timers()("batch-generator", log_level=2)
    timer.start()
    batch = batch_on_this_rank(samples, get_attr_wrapped_model(model, "vp_stage"))
    timer.stop()
    output = model(
        batch["tokens"],
        batch["position_ids"],
        batch["attention_mask"],
        labels=batch["labels"],
        loss_mask=batch["loss_mask"],
        packed_seq_params=packing_of(batch),
    )
    return output, partial(masked_loss, batch["loss_mask"])


def reads_data(vp_stage: int | None = None) -> bool:
    """Whether this rank takes samples from the data sets itself."""
    reads = is_first_or_last_pipeline_stage(vp_stage) or packs_documents()
    return mpu.get_tensor_model_parallel_rank() == 0 and reads


def train_valid_test_datasets(num_samples: list[int], vp_stage: int | None = None) -> tuple:
    """The three data sets that --data-path, --mock-data and their kin name, of at least `num_samples` samples each."""
    args = get_args()
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    config = GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split,
        num_dataset_builder_threads=args.num_dataset_builder_threads,
        path_to_cache=args.data_cache_path,
        mmap_bin_files=args.mmap_bin_files,
        tokenizer=build_tokenizer(args),
        reset_position_ids=args.reset_position_ids,
        reset_attention_mask=args.reset_attention_mask,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=args.create_attention_mask_in_dataloader,
        context_parallel_size=args.context_parallel_size,
        data_parallel_size=args.data_parallel_size,
        sequence_parallel_size=args.tensor_model_parallel_size if args.sequence_parallel else 0,
        inter_document_masking=args.dataloader_inter_document_masking,
    )
    dataset = SFTDataset if args.sft else MockGPTDataset if args.mock_data else GPTDataset
    return BlendedMegatronDatasetBuilder(dataset, num_samples, partial(reads_data, vp_stage=vp_stage), config).build()


# Megatron asks the provider whether every rank may call it (the builder then decides by `reads_data`).
train_valid_test_datasets.is_distributed = True


def main() -> None:
    """Parse Megatron's arguments from sys.argv and train."""
    # Ranks that start one after the other then count --exit-duration-in-mins from the first one's start.
    set_startup_timestamps(program_start=PROGRAM_START, main_entry=time.time())
    args = parse_and_validate_args()
    if asked := [name for name in UNSUPPORTED if getattr(args, name, None)]:
        flag = asked[0].replace("_", "-")
        sys.exit(f"pretrain_gpt.py: error: --{flag} needs pretrain_gpt.py of a Megatron-LM checkout")
    config = pretrain_cfg_container_from_args(args, gpt_config_from_args(args))
    pretrain(config, train_valid_test_datasets, ModelType.encoder_or_decoder, forward_step)


if __name__ == "__main__":
    main()
