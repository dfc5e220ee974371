"""Read heads, channels, dtype and tokens per rank from Megatron's arguments."""

from __future__ import annotations

import argparse

import torch

from megatron_wallfacer.kernels.protocol import accumulation_dtype
from megatron_wallfacer.megatron.flags import Flags
from megatron_wallfacer.schedule.volume import Shape


def kv_heads(args: argparse.Namespace) -> int:
    """Return the number of kv heads of the model.

    Megatron reads --num-query-groups only with --group-query-attention. Latent attention (MLA) has keys and values for
    every query head.
    """
    if _is_latent(args):
        return args.num_attention_heads
    return args.num_query_groups if args.group_query_attention else args.num_attention_heads


def shape_of(args: argparse.Namespace, dtype: torch.dtype) -> Shape:
    """Return the shape of one rank's shard of Q, K and V in one layer."""
    q_heads, k_heads = heads_per_rank(args)
    return Shape(
        tokens=args.seq_length // Flags.of(args).cp_size,
        q_heads=q_heads,
        kv_heads=k_heads,
        head_dim=head_dim(args),
        v_head_dim=v_head_dim(args),
        batch=args.micro_batch_size or 1,
        itemsize=dtype.itemsize,
        accumulate_itemsize=accumulation_dtype(dtype).itemsize,
    )


def heads_per_rank(args: argparse.Namespace) -> tuple[int, int]:
    """Return (query heads, kv heads) per rank, each at least 1."""
    parallel = args.tensor_model_parallel_size
    return max(1, args.num_attention_heads // parallel), max(1, kv_heads(args) // parallel)


def head_dim(args: argparse.Namespace) -> int | None:
    """Return the channels per query or key head, or None if the command line leaves model sizes to a checkpoint."""
    if _is_latent(args):
        return args.qk_head_dim + args.qk_pos_emb_head_dim
    if args.kv_channels is not None:
        return args.kv_channels
    return None if args.hidden_size is None else args.hidden_size // args.num_attention_heads


def v_head_dim(args: argparse.Namespace) -> int | None:
    """Return the channels per value head, or None if a value head has as many channels as a key head."""
    return args.v_head_dim if _is_latent(args) else None


def dtype_of(args: argparse.Namespace) -> torch.dtype:
    """Return the dtype of Q, K and V."""
    if args.bf16:
        return torch.bfloat16
    return torch.float16 if args.fp16 else torch.float32


def _is_latent(args: argparse.Namespace) -> bool:
    return getattr(args, "multi_latent_attention", False)
