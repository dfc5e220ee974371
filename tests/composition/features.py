"""What people turn on beside context parallelism: factors, their levels, and which levels may not meet."""

from __future__ import annotations

from functools import cache

from megatron_wallfacer.errors import OptionError
from megatron_wallfacer.schedule.schemes import make_plan
from tests.composition.pairs import Constraint, Space

MOST_RANKS = 8
Q_HEADS = 8

#: Small on purpose: what is compared is exact at any size.
MODEL = (
    "--num-layers 2 --hidden-size 64 --ffn-hidden-size 128 "
    f"--num-attention-heads {Q_HEADS} --normalization RMSNorm --swiglu --disable-bias-linear --hidden-dropout 0 "
    "--attention-dropout 0 --seq-length 128 --max-position-embeddings 128 "
    "--lr 2e-3 --lr-decay-style constant --clip-grad 1.0 --log-interval 1"
).split()

_EXPERTS = (
    "--num-experts 4 --moe-router-topk 2 --moe-token-dispatcher-type alltoall "
    "--moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 0.01 --moe-ffn-hidden-size 64 --moe-layer-freq 2"
)

#: Factor -> level -> Megatron's flags for it. What depends on several factors is in `tests.composition.combination`.
FLAGS: dict[str, dict[str, str]] = {
    "tensor": {"1": "", "2": "--tensor-model-parallel-size 2 --sequence-parallel"},
    "pipeline": {
        "1": "",
        "1F1B": "--pipeline-model-parallel-size 2",
        "interleaved": "--num-layers 4 --pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1",
    },
    "data": {"1": "", "2": ""},
    "optimizer": {
        "plain": "",
        "distributed": "--use-distributed-optimizer",
        "overlapped": "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather",
        "bf16-gradients": "--use-distributed-optimizer --grad-reduce-in-bf16",
    },
    "experts": {"dense": "", "moe": _EXPERTS, "moe-ep2": f"{_EXPERTS} --expert-model-parallel-size 2"},
    "mtp": {"off": "", "on": "--mtp-num-layers 1"},
    "batch": {"single": "", "accumulated": "", "pairs": ""},
    "loss": {"mean": "", "per-token": "--calculate-per-token-loss"},
    "embeddings": {"tied": "", "untied": "--untie-embeddings-and-output-weights"},
    "recompute": {
        "none": "",
        "selective": "--recompute-granularity selective --recompute-modules core_attn",
        "uniform": "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
        "block": "--recompute-granularity full --recompute-method block --recompute-num-layers 1",
        "kept": "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
    },
    "heads": {
        "mha": "",
        "gqa": "--group-query-attention --num-query-groups 2",
        "mqa": "--group-query-attention --num-query-groups 1",
    },
    "attention": {
        "full": "",
        "window": "--window-size 32,0 --window-attn-skip-freq 2",
        "sinks": "--softmax-type learnable",
        "off-by-one": "--softmax-type off-by-one",
        "mla": "--multi-latent-attention --q-lora-rank 16 --kv-lora-rank 16 --qk-head-dim 8 --qk-pos-emb-head-dim 8 "
        "--v-head-dim 16",
    },
    "qk-norm": {"off": "", "on": "--qk-layernorm"},
    "dtype": {"fp32": "", "bf16": "--bf16 --attention-softmax-in-fp32"},
    "evaluation": {"off": "--eval-iters 0 --split 100,0,0", "on": "--eval-interval 4 --eval-iters 1 --split 98,2,0"},
    "documents": {
        "one": "",
        "masked": "",
        "conversations": "--sft --sft-tokenizer-prompt-format default --no-create-attention-mask-in-dataloader",
    },
    "positions": {"rope": "--position-embedding-type rope", "learned": "--position-embedding-type learned_absolute"},
    "cp": {"2": "", "4": "", "8": ""},
    "scheme": dict.fromkeys(
        (
            "team-ring",
            "wallfacer",
            "ring",
            "tokenring",
            "double-ring",
            "burst",
            "ulysses",
            "usp",
            "loongtrain",
            "all-gather",
            "mesh",
        ),
        "",
    ),
    # Behind the factors that many constraints look at: a row is completed in this order.
    "tiles": {"off": "", "on": ""},
    "host": {"off": "", "inputs": "", "all": ""},
}

#: Flags of the run that is judged only.
OURS: dict[str, dict[str, str]] = {
    "recompute": {"kept": "--wallfacer-keep-attention-output"},
    # Numbers that divide neither the tokens of a rank nor each other.
    "tiles": {"on": "--wallfacer-loss-tiles 3 --wallfacer-mlp-tiles 5"},
    "host": {
        "inputs": "--wallfacer-layer-inputs-on-host 1",
        "all": "--wallfacer-layer-inputs-on-host 1 --wallfacer-keep-on-host 1",
    },
    "documents": {"masked": "--dataloader-inter-document-masking"},
}
#: Flags of the run at size 1 only, where Megatron's own attention trains it: documents are kept apart by
#: a mask as a tensor, which no other attention reads.
MEGATRONS: dict[str, dict[str, str]] = {"documents": {"masked": "--reset-attention-mask --reset-position-ids"}}

FACTORS: dict[str, tuple[str, ...]] = {name: tuple(levels) for name, levels in FLAGS.items()}
#: Recomputation whose layers save their input.
_WITH_INPUTS = ("uniform", "block", "kept")
KV_HEADS = {"mha": Q_HEADS, "gqa": 2, "mqa": 1}
#: With a team of one these would be another scheme under a borrowed name.
TEAM_OF_TWO = ("team-ring", "wallfacer")
#: One axis; the others need two, and so four ranks, to be themselves.
ONE_AXIS = ("ring", "tokenring", "ulysses", "all-gather", "team-ring")


def plan_options(scheme: str) -> dict[str, int]:
    """What is asked for by hand: `make_plan`'s keywords."""
    return {"team_size": 2} if scheme in TEAM_OF_TWO else {}


def pipeline_size(level: str) -> int:
    return 1 if level == "1" else 2


def _few_enough(tensor: str, pipeline: str, data: str, cp: str) -> bool:
    return int(tensor) * pipeline_size(pipeline) * int(data) * int(cp) <= MOST_RANKS


def _two_axes(cp: str, scheme: str) -> bool:
    return scheme in ONE_AXIS or int(cp) >= 4


@cache
def _heads_divide(tensor: str, heads: str, cp: str, scheme: str) -> bool:
    at_hand = {"q_heads": Q_HEADS // int(tensor), "kv_heads": max(1, KV_HEADS[heads] // int(tensor))}
    try:
        make_plan(scheme, int(cp), **at_hand, **plan_options(scheme))
    except OptionError:
        return False
    return True


CONSTRAINTS = (
    Constraint(("tensor", "pipeline", "data", "cp"), _few_enough, f"at most {MOST_RANKS} ranks"),
    Constraint(("cp", "scheme"), _two_axes, "a scheme of two axes is itself from four ranks on"),
    Constraint(
        ("tensor", "heads", "cp", "scheme"), _heads_divide, "ranks that divide heads are rejected where they cannot"
    ),
    Constraint(
        ("pipeline", "batch"),
        lambda pipeline, batch: (pipeline, batch) != ("interleaved", "single"),
        "micro-batches must be a multiple of the pipeline's size (pipeline_parallel/schedules.py, "
        "forward_backward_pipelining_with_interleaving)",
    ),
    Constraint(
        ("experts", "batch", "data"),
        lambda experts, batch, data: (experts, batch, data) != ("moe-ep2", "single", "1"),
        "expert parallelism without context parallelism takes two data-parallel ranks, so two sequences",
    ),
    Constraint(
        ("attention", "heads"),
        lambda attention, heads: attention != "mla" or heads == "mha",
        "rejected by Megatron (training/arguments.py:1893)",
    ),
    Constraint(
        ("documents", "mtp"),
        lambda documents, mtp: (documents, mtp) != ("masked", "on"),
        "rejected by the plugin: Megatron shifts tokens as if each document were cut (multi_token_prediction.py:238)",
    ),
    Constraint(
        ("documents", "batch", "pipeline"),
        lambda documents, batch, pipeline: documents == "one" or batch != "pairs" or pipeline == "1",
        "rejected by the plugin: packed sequences follow each other, but Megatron's stages are sent them side by side "
        "(pipeline_parallel/schedules.py, get_tensor_shapes)",
    ),
    Constraint(
        ("mtp", "positions"),
        lambda mtp, positions: (mtp, positions) != ("on", "learned"),
        "rejected by Megatron (training/arguments.py:857)",
    ),
    Constraint(
        ("optimizer", "dtype"),
        lambda optimizer, dtype: optimizer != "bf16-gradients" or dtype == "bf16",
        "in fp32 the flag changes nothing: gradients have the dtype of the parameters",
    ),
    Constraint(
        ("optimizer", "tiles"),
        lambda optimizer, tiles: (optimizer, tiles) != ("bf16-gradients", "on"),
        "an error of the plugin: sums over tiles would be in bf16",
    ),
    Constraint(
        ("tiles", "mtp"),
        lambda tiles, mtp: (tiles, mtp) != ("on", "on"),
        "rejected by the plugin: extra layers compute logits of their own",
    ),
    Constraint(
        ("host", "recompute"),
        lambda host, recompute: (
            recompute in {"off": ("none", "selective", *_WITH_INPUTS), "inputs": _WITH_INPUTS, "all": ("kept",)}[host]
        ),
        "rejected by the plugin: without recomputation of layers there are no such inputs, unless kept no such outputs",
    ),
)

SPACE = Space(FACTORS, CONSTRAINTS)
