"""List the combinations of arguments that the plugin does not support. Checks, messages, docs and tests use this list.

The error names the first unsupported combination in the order of the list.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, get_args

from megatron_wallfacer.errors import WallfacerError
from megatron_wallfacer.megatron.combination import (
    Combination,
    When,
    apart,
    attention_dropout,
    both,
    context_parallel_size,
    cp_comm_type,
    given,
    left_out,
    packed,
    packed_in_whole_sequence,
    ranks,
    reads,
    sequence_length,
    several_sequences,
    typed,
    window,
)
from megatron_wallfacer.megatron.megatron_graphs import (
    attention_in_graphs,
    local_graphs_around_attention,
    whole_iteration_graph,
)
from megatron_wallfacer.megatron.packed import LAYOUT_NAMES
from megatron_wallfacer.megatron.releases import LOCAL_GRAPHS
from megatron_wallfacer.megatron.unsupported_memory import KEEP, MEMORY, RECOMPUTED
from megatron_wallfacer.megatron.version import megatron_version
from megatron_wallfacer.schedule.mask import NO_LIMIT

VERIFY = "--wallfacer-verify-every"
PACKED = "--dataloader-inter-document-masking"
GRAPHS, MODULES = "--cuda-graph-impl", "--cuda-graph-modules"
ATTENTION = reads(attention_in_graphs)
ROPE = given("--position-embedding-type", "rope")

SPLIT = "--wallfacer-scheme decides how attention is split over the ranks"
LOGITS = "no kernel of the plugin returns the largest attention logit"
SHARDS = f"Megatron's implementation expects each document to be split, but {PACKED} splits the whole sequence"
BYPASS = "Megatron then builds attention without GPT layer specs, which the plugin needs"
NO_WAITS = "a replayed graph has no waits to time"
HOST_COPIES = "the host copies staged messages, which a graph cannot capture"
DOCUMENTS = "a captured graph computes the documents of one micro-batch only"
ONE_GROUP = "all packed documents share the context-parallel group of the job"


def captured(example: str, other: str, reason: str) -> Combination:
    """Return the :class:`Combination` of a flag (``other``) with Megatron's CUDA graphs that contain attention."""
    flag, *values = other.split()
    instead = f"limit {MODULES} to moe_router and moe_preprocess"
    return Combination(example, both(ATTENTION, given(flag, *values)), f"be left out with {other}", reason, instead)


def on_layer(flag: str, reason: str, instead: str = "") -> Combination:
    """Return the :class:`Combination` for a layer's setting that must be False and that no flag sets."""
    return Combination(f"{flag}=True", given(flag), "be False", reason, instead, when=("model",))


UNSUPPORTED: tuple[Combination, ...] = (
    left_out("--yaml-cfg job.yaml", "Megatron then ignores all flags, also --wallfacer-cp-size", "give flags"),
    Combination(
        "--context-parallel-size 4",
        context_parallel_size,
        "be {cp_size}, the value of --wallfacer-cp-size, or be left out",
        "both flags set the number of context-parallel ranks",
        also=("--context-parallel-size 1", "--context-parallel-size=2"),
    ),
    Combination(
        "--micro-batch-size 2 --sft --pipeline-model-parallel-size 2",
        both(several_sequences, packed),
        f"be 1 with --sft or {PACKED} on several pipeline stages",
        "a packed micro-batch is one sequence, but pipeline stages expect --micro-batch-size sequences",
        "put more documents into one sequence",
        also=(f"--micro-batch-size 2 {PACKED} --no-rope-fusion --pipeline-model-parallel-size 2",),
    ),
    Combination(
        "--wallfacer-cp-size 8 --tensor-model-parallel-size 2",
        ranks,
        "divide the number of ranks over tensor- times pipeline-parallel size",
        "the data-parallel size is the number of ranks divided by this product",
        "use more ranks or smaller sizes",
    ),
    Combination(
        "--seq-length 1000",
        sequence_length,
        "be a multiple of 2 x --wallfacer-cp-size {cp_size}",
        "each rank holds two chunks of equal length",
        also=("--encoder-seq-length 1000",),
    ),
    Combination("--cp-comm-type p2p", cp_comm_type, "be left out", SPLIT, "use --wallfacer-scheme ring"),
    Combination(
        "--hierarchical-context-parallel-sizes 2 4",
        typed("--hierarchical-context-parallel-sizes"),
        "be left out",
        SPLIT,
        "use --wallfacer-scheme usp or loongtrain",
    ),
    Combination(
        "--hybrid-context-parallel",
        typed("--hybrid-context-parallel"),
        "be left out",
        "hybrid context parallelism changes the group with each batch, but the plugin creates its groups once",
    ),
    Combination(
        "--attention-dropout 0.1",
        attention_dropout,
        "be 0 with --wallfacer-cp-size",
        "no kernel of the plugin can repeat the same dropout in backward",
        "use --attention-dropout 0",
        when=("parse", "model"),
    ),
    Combination(
        "--window-size 128",
        window,
        f"be LEFT,RIGHT, numbers of tokens from 0 or {NO_LIMIT} for no limit",
        "a window has a left and a right limit",
        "use --window-size 128,0 for 128 tokens before each token",
        when=("parse", "model"),
        also=("--window-size 128,-2",),
    ),
    Combination(
        f"{PACKED} --position-embedding-type rope",
        both(packed_in_whole_sequence, given("--apply-rope-fusion"), ROPE),
        "be given with --no-rope-fusion",
        "the fused RoPE kernel expects each document, not the whole sequence, to be split over the ranks",
        distributed_only=True,
    ),
    Combination(
        f"--position-embedding-type mrope {PACKED}",
        both(given("--position-embedding-type", "mrope"), packed_in_whole_sequence),
        f"not be given with {PACKED}",
        SHARDS,
        "use --position-embedding-type rope",
        distributed_only=True,
    ),
    Combination(
        f"--mtp-num-layers 1 {PACKED}",
        both(given("--mtp-num-layers"), packed_in_whole_sequence),
        f"be left out with {PACKED}",
        SHARDS,
        "pack with --sft",
        distributed_only=True,
    ),
    left_out("--reset-attention-mask", "the plugin reads no mask tensor", f"use {PACKED} of Megatron 0.19"),
    left_out("--qk-clip", LOGITS, when=("parse", "model")),
    left_out("--log-max-attention-logit", LOGITS, when=("parse", "model")),
    Combination(
        f"{GRAPHS} full_iteration",
        reads(whole_iteration_graph),
        "be left out",
        "the plugin does not capture its attention inside a graph of a whole iteration",
        f"use {GRAPHS} local or transformer_engine",
        also=("--cuda-graph-scope full_iteration",),
    ),
    Combination(
        f"{GRAPHS} local",
        reads(local_graphs_around_attention),
        "be left out",
        "graphs of earlier releases reuse memory that backward still reads",
        f"limit {MODULES}, in Megatron 0.17 --cuda-graph-scope, to moe_router and moe_preprocess",
        before=LOCAL_GRAPHS,
        also=(f"{GRAPHS} local {MODULES} moe_router mlp",),
    ),
    captured(f"{GRAPHS} local {MODULES} mlp --sft", "--sft", DOCUMENTS),
    captured(f"{GRAPHS} transformer_engine {MODULES} attn moe_router {PACKED}", PACKED, DOCUMENTS),
    captured(f"{GRAPHS} local {RECOMPUTED}", KEEP, "the host reads values of kept outputs from the GPU"),
    captured(
        f"{GRAPHS} local --wallfacer-timeline x", "--wallfacer-timeline", "a replayed graph has no steps to record"
    ),
    captured(f"{GRAPHS} local --wallfacer-log-metrics --tensorboard-dir x", "--wallfacer-log-metrics", NO_WAITS),
    captured(f"{GRAPHS} local --wallfacer-transfers staged", "--wallfacer-transfers staged", HOST_COPIES),
    captured(f"{GRAPHS} local {VERIFY} 2", VERIFY, "a replayed graph cannot compare messages"),
    Combination(
        "--wallfacer-cuda-graphs --wallfacer-transfers staged",
        both(given("--wallfacer-cuda-graphs"), given("--wallfacer-transfers", "staged")),
        "be left out with --wallfacer-transfers staged",
        HOST_COPIES,
    ),
    apart(
        "--wallfacer-cuda-graphs",
        "--wallfacer-log-metrics",
        NO_WAITS,
        needs="--tensorboard-dir x",
    ),
    Combination(
        "--attention-backend flash",
        given("--attention-backend", off="auto"),
        "be auto",
        "the flag selects a kernel of TransformerEngine's attention, which the plugin replaces",
        "use --wallfacer-kernel",
    ),
    Combination(
        "--position-embedding-type relative",
        given("--position-embedding-type", "relative"),
        "be rope, mrope, yarn, learned_absolute or none",
        "the plugin adds no bias to attention scores",
    ),
    Combination(
        "--transformer-impl inference_optimized",
        given("--transformer-impl", "inference_optimized"),
        "be local or transformer_engine",
        "inference-optimized layers cannot be trained",
    ),
    Combination(
        "--wallfacer-layers 1 --transformer-impl local",
        both(given("--wallfacer-layers"), given("--transformer-impl", "local")),
        "be left out with --transformer-impl local",
        "Megatron's own attention supports context parallelism only with TransformerEngine",
        distributed_only=True,
    ),
    *MEMORY,
    left_out("--heterogeneous-layers-config-path x.json", BYPASS),
    left_out("--heterogeneous-layers-config-encoded-json {}", BYPASS),
    left_out("--experimental-attention-variant gated_delta_net", BYPASS),
    left_out("--hybrid-layer-pattern M*M*", BYPASS),
    left_out("--hybrid-override-pattern M*M*", BYPASS),
    on_layer("fp8_dot_product_attention", "no kernel of the plugin computes attention in fp8"),
    on_layer("fp8_multi_head_attention", "no kernel of the plugin computes attention in fp8"),
    *(
        Combination(f"{name}=x", given(name), "be None", ONE_GROUP, "leave --hybrid-context-parallel out", ("call",))
        for name in ("cp_group", "local_cp_size")
    ),
    Combination(
        "qkv_format=sbhd",
        given("qkv_format", off="thd"),
        "be thd",
        "packed documents have one dimension of tokens",
        when=("call",),
    ),
    *(
        Combination(
            f"{name}=contiguous",
            given(name, off="zigzag"),
            "be zigzag",
            "rank r of P holds chunks r and 2P-1-r of the sequence",
            when=("call",),
            distributed_only=True,
        )
        for name in LAYOUT_NAMES
    ),
)
#: Combinations by kind of object, because every call of every layer is checked and must be fast.
_CHECKED_AT = {when: tuple(one for one in UNSUPPORTED if when in one.when) for when in get_args(When)}


def unsupported(when: When, checked: Any, cp_size: int, argv: Sequence[str] = ()) -> str | None:
    """Return the message of the first unsupported combination, or None.

    Args:
        when: moment of the check: ``parse``, ``model`` or ``call``.
        checked: Megatron's arguments, TransformerConfig or PackedSeqParams, depending on ``when``.
        cp_size: P, the number of context-parallel ranks.
        argv: words of the command line.
    """
    for combination in _CHECKED_AT[when]:
        found = None if combination.distributed_only and cp_size == 1 else combination.find(checked, argv)
        if found and (combination.before is None or megatron_version()[:2] < combination.before):
            return combination.message(found, cp_size)
    return None


def check_supported(args: Any, argv: Sequence[str] | None = None) -> None:
    """Raise a WallfacerError that names the first unsupported combination of Megatron's arguments, if there is one.

    Args:
        args: parsed arguments with the plugin on.
        argv: command line, to distinguish defaults from typed values; None for ``sys.argv[1:]``.
    """
    message = unsupported("parse", args, args.wallfacer_cp_size, sys.argv[1:] if argv is None else argv)
    if message is not None:
        raise WallfacerError(message)
