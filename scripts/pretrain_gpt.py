"""Pretrains a GPT model with nothing but the `megatron-core` wheel (0.19 or newer).

The wheel carries Megatron's training loop (`megatron.training`) and no entry script. This is one: Megatron's own
arguments, model builder, data sets and loop, and between them only what a script has to bring: batch, loss, data sets.

    torchrun --nproc-per-node 8 -m megatron_wallfacer scripts/pretrain_gpt.py <Megatron's arguments>

On a machine with GPUs it runs as well without the plugin (`torchrun ... scripts/pretrain_gpt.py`). People who have a
Megatron-LM checkout use its `pretrain_gpt.py` instead, which also knows packed sequences, fine-tuning and distillation;
this script trains on plain sequences and stops when asked for anything else.
"""

from __future__ import annotations

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
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
from megatron.core.utils import get_attr_wrapped_model, get_batch_on_this_cp_rank, get_batch_on_this_tp_rank
from megatron.training import get_args, get_timers, pretrain
from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
from megatron.training.arguments import parse_and_validate_args
from megatron.training.utils import get_blend_and_blend_per_split, is_first_or_last_pipeline_stage

Batch = dict[str, torch.Tensor | None]
FIELDS = ("tokens", "labels", "loss_mask", "position_ids", "attention_mask")
# Flags of Megatron's parser that its own pretrain_gpt.py implements and this script does not.
UNSUPPORTED = (
    "sft",
    "fim_data",
    "dataloader_inter_document_masking",
    "hybrid_context_parallel",
    "mtp_num_layers",
    "logits_load_dir",
)


def batch_on_this_rank(samples: Iterator[dict[str, torch.Tensor]] | None, vp_stage: int | None) -> Batch:
    """This rank's part of the next micro-batch.

    Only the first rank of a tensor-parallel group reads data; it broadcasts to the others, then each context-parallel
    rank keeps its two chunks of the sequence.

    Returns:
        `FIELDS` -> `[micro_batch, seq_length / context_parallel_size]` (attention_mask: `[micro_batch, 1, that,
        seq_length]`), or None where this pipeline stage does not use the field.
    """
    if not is_first_or_last_pipeline_stage(vp_stage):
        return dict.fromkeys(FIELDS)
    args = get_args()
    tp_rank = mpu.get_tensor_model_parallel_rank()
    batch: Batch = {}
    if tp_rank == 0:
        sample = next(samples)
        batch = {name: sample[name].cuda(non_blocking=True) if name in sample else None for name in FIELDS}
    batch = get_batch_on_this_tp_rank(
        batch,
        has_cu_seqlens=False,
        is_hybrid_cp=False,
        create_attention_mask_in_dataloader=args.create_attention_mask_in_dataloader,
        broadcast_src_rank=mpu.get_tensor_model_parallel_src_rank(),
        broadcast_group=mpu.get_tensor_model_parallel_group(),
        cp_size=args.context_parallel_size,
        tp_rank=tp_rank,
        micro_batch_size=args.micro_batch_size,
        seq_length=args.seq_length,
        mtp_on_this_rank=False,
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        is_pipeline_first_stage=mpu.is_pipeline_first_stage(),
        is_pipeline_last_stage=mpu.is_pipeline_last_stage(),
    )
    return get_batch_on_this_cp_rank(batch, is_hybrid_cp=False, cp_group=mpu.get_context_parallel_group())


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
    )
    return output, partial(masked_loss, batch["loss_mask"])


def reads_data(vp_stage: int | None = None) -> bool:
    """Whether this rank takes samples from the data sets itself."""
    return mpu.get_tensor_model_parallel_rank() == 0 and is_first_or_last_pipeline_stage(vp_stage)


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
    )
    dataset = MockGPTDataset if args.mock_data else GPTDataset
    return BlendedMegatronDatasetBuilder(dataset, num_samples, partial(reads_data, vp_stage=vp_stage), config).build()


# Megatron asks the provider whether every rank may call it (the builder then decides by `reads_data`).
train_valid_test_datasets.is_distributed = True


def main() -> None:
    """Parse Megatron's arguments from sys.argv and train."""
    args = parse_and_validate_args()
    if asked := [name for name in UNSUPPORTED if getattr(args, name, None)]:
        flag = asked[0].replace("_", "-")
        sys.exit(f"pretrain_gpt.py: error: --{flag} needs pretrain_gpt.py of a Megatron-LM checkout")
    config = pretrain_cfg_container_from_args(args, gpt_config_from_args(args))
    pretrain(config, train_valid_test_datasets, ModelType.encoder_or_decoder, forward_step)


if __name__ == "__main__":
    main()
