"""Unsupported combinations with the plugin's memory flags, such as token tiles and tensors in host memory."""

from __future__ import annotations

from megatron_wallfacer.megatron.combination import (
    Combination,
    apart,
    both,
    given,
    offloading,
    reads,
    recomputed_attention,
    recomputed_mlp,
    without,
)
from megatron_wallfacer.megatron.megatron_graphs import attention_in_graphs, mlp_in_graphs
from megatron_wallfacer.megatron.releases import OUTPUT_PROCESSOR

LOSS, MLP = "--wallfacer-loss-tiles", "--wallfacer-mlp-tiles"
KEEP, ON_HOST, INPUTS = (
    f"--wallfacer-{name}" for name in ("keep-attention-output", "keep-on-host", "layer-inputs-on-host")
)
GRAPHS, MODULES = "--cuda-graph-impl", "--cuda-graph-modules"
FULL, RECOMPUTED = "--recompute-granularity full", f"{KEEP} --recompute-activations"

NO_RECOMPUTE = "captured graphs do not recompute activations"
LOW_PRECISION = "fp8 and fp4 layers need TransformerEngine's checkpoint, but the plugin supports only Megatron's"
WGRAD = "Megatron would compute delayed weight gradients of the last tile only"
BF16 = "a sum of weight gradients over tiles loses accuracy in bf16"
MOVES = "both flags move activations to host memory"
ALTERNATE = "copies to host memory follow one micro-batch, but this overlap alternates between two micro-batches"


def tiles(flag: str) -> tuple[Combination, ...]:
    """Return the combinations with ``flag`` that are unsupported for every flag for token tiles."""
    return (
        apart(f"{flag} 4", "--fp8-format hybrid", LOW_PRECISION),
        apart(f"{flag} 4", "--fp4-format e2m1", LOW_PRECISION),
        apart(f"{flag} 4", "--delay-wgrad-compute", WGRAD),
        apart(f"{flag} 4", "--grad-reduce-in-bf16", BF16),
    )


def on_host(flag: str, needs: str) -> tuple[Combination, ...]:
    """Return the unsupported combinations of ``flag``. The flag moves activations to host memory."""
    cpu, present = "--cpu-offloading-num-layers", both(given(flag), offloading)
    return (
        apart(f"{flag} 0.5", "--fine-grained-activation-offloading", MOVES, needs=needs),
        Combination(f"{flag} 0.5 {needs} {cpu} 1", present, f"be left out with {cpu}", MOVES),
        apart(f"{flag} 0.5", "--overlap-moe-expert-parallel-comm", ALTERNATE, needs=needs),
    )


MEMORY: tuple[Combination, ...] = (
    Combination(
        KEEP,
        without(given(KEEP), recomputed_attention),
        "be given with flags that recompute attention",
        "without recomputation, backward does not run attention's forward pass again",
        f"use {FULL}, or selective with core_attn among --recompute-modules",
        also=(f"{KEEP} --recompute-granularity selective --recompute-modules mlp",),
    ),
    Combination(
        f"{LOSS} 4",
        given(LOSS),
        "be left out",
        "GPTModel of earlier releases has no argument output_processor",
        before=OUTPUT_PROCESSOR,
    ),
    *tiles(LOSS),
    apart(f"{LOSS} 4", "--mtp-num-layers 1", "multi-token prediction computes its own logits without tiles"),
    apart(f"{LOSS} 4", "--defer-embedding-wgrad-compute", "Megatron keeps all inputs of the output layer"),
    apart(f"{LOSS} 4", "--overlap-moe-expert-parallel-comm", "Megatron's overlap schedule computes the loss itself"),
    Combination(
        f"{MLP} 4 --recompute-granularity selective --recompute-modules mlp",
        both(given(MLP), recomputed_mlp),
        "be left out with --recompute-modules mlp",
        "backward already recomputes each tile",
        "leave mlp out of --recompute-modules",
    ),
    Combination(
        f"{MLP} 4 {GRAPHS} transformer_engine {MODULES} mlp",
        both(given(MLP), reads(mlp_in_graphs)),
        f"be left out with {GRAPHS}",
        NO_RECOMPUTE,
        f"limit {MODULES} to modules without an MLP",
        also=(f"{MLP} 4 {GRAPHS} local",),
    ),
    *tiles(MLP),
    apart(f"{MLP} 4", "--tp-comm-overlap", "the overlap buffers of TransformerEngine have the size of all tokens"),
    apart(f"{MLP} 4", "--mlp-chunks-for-training 2", "both flags divide the tokens of an MLP", off=1),
    Combination(
        f"{ON_HOST} 0.5",
        without(given(ON_HOST), given(KEEP)),
        f"be given with {KEEP}",
        "only kept attention outputs can be moved to host memory",
    ),
    *on_host(ON_HOST, RECOMPUTED),
    Combination(
        f"{INPUTS} 0.5",
        without(given(INPUTS), given("--recompute-granularity", "full")),
        f"be given with {FULL}",
        "without full recomputation a layer saves more tensors than its input",
    ),
    *on_host(INPUTS, FULL),
    apart(f"{INPUTS} 0.5", "--fp8-format hybrid", LOW_PRECISION, needs=FULL),
    apart(f"{INPUTS} 0.5", "--fp4-format e2m1", LOW_PRECISION, needs=FULL),
    apart(f"{INPUTS} 0.5", "--distribute-saved-activations", "the flag splits layer inputs over ranks", needs=FULL),
    Combination(
        f"{INPUTS} 0.5 {FULL} {GRAPHS} local",
        both(given(INPUTS), reads(lambda args: attention_in_graphs(args) or mlp_in_graphs(args))),
        f"be left out with {GRAPHS}",
        NO_RECOMPUTE,
    ),
)
