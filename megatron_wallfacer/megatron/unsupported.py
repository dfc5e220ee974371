"""Combinations of flags that the plugin does not support, checked before the first step. Each rule names one flag.

A rule treats an attribute that a Megatron release lacks as not given.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence

from megatron_wallfacer.errors import WallfacerError
from megatron_wallfacer.megatron.host_memory.flags import unsupported_with_keep_on_host, unsupported_with_layer_inputs
from megatron_wallfacer.megatron.keep import unsupported_recompute
from megatron_wallfacer.megatron.layer_selection import unsupported_layer_selection
from megatron_wallfacer.megatron.masks import unsupported_window
from megatron_wallfacer.megatron.megatron_graphs import graphs_around_attention
from megatron_wallfacer.megatron.packed import shards_whole_sequence
from megatron_wallfacer.megatron.tile_flags import unsupported_with_loss_tiles, unsupported_with_mlp_tiles

Args = argparse.Namespace
Rule = Callable[[Args, Sequence[str]], str | None]


def check_supported(args: Args, argv: Sequence[str] | None = None) -> None:
    """Check that the plugin supports Megatron's arguments.

    Args:
        args: parsed arguments with the plugin on; ``context_parallel_size`` as Megatron parsed it, or already P.
        argv: words of the command line, which distinguish a default from a typed value; ``sys.argv`` unless given.

    Raises:
        WallfacerError: the first unsupported combination, as one line.
    """
    argv = sys.argv[1:] if argv is None else argv
    for rule in RULES:
        message = rule(args, argv)
        if message is not None:
            raise WallfacerError(message)


def given(argv: Sequence[str], name: str) -> bool:
    """Return whether a flag is on the command line."""
    return any(word == name or word.startswith(f"{name}=") for word in argv)


def _yaml(args: Args, argv: Sequence[str]) -> str | None:
    if getattr(args, "yaml_cfg", None) is None:
        return None
    return f"--yaml-cfg {args.yaml_cfg}: must be left out, Megatron then ignores every flag, --wallfacer-cp-size too"


def _size(args: Args, argv: Sequence[str]) -> str | None:
    size, ours = args.context_parallel_size, args.wallfacer_cp_size
    # A value that is neither the default nor ours was given somehow, if not on the command line.
    if size == ours or (size == 1 and not given(argv, "--context-parallel-size")):
        return None
    return f"--context-parallel-size {size}: must be {ours} as --wallfacer-cp-size says, or be left out"


def _sequence(args: Args, argv: Sequence[str]) -> str | None:
    multiple = 2 * args.wallfacer_cp_size
    for name in ("seq_length", "encoder_seq_length"):
        length = getattr(args, name, None)
        if length is not None and length % multiple:
            shown = f"--{name.replace('_', '-')} {length}"
            return f"{shown}: must be a multiple of 2 x --wallfacer-cp-size = {multiple}"
    return None


def _world(args: Args, argv: Sequence[str]) -> str | None:
    world = int(os.environ.get("WORLD_SIZE", "1"))
    others = args.tensor_model_parallel_size * args.pipeline_model_parallel_size
    if world % (others * args.wallfacer_cp_size) == 0:
        return None
    return (
        f"--wallfacer-cp-size {args.wallfacer_cp_size}: times tensor and pipeline parallel size ({others}) "
        f"it must divide the {world} ranks of the job"
    )


def _other_context_parallelism(args: Args, argv: Sequence[str]) -> str | None:
    flags = ("--cp-comm-type", "--hierarchical-context-parallel-sizes", "--hybrid-context-parallel")
    # --cp-comm-type applies to layers that keep Megatron's own attention.
    allowed = ("--cp-comm-type",) if getattr(args, "wallfacer_layers", None) is not None else ()
    for name in flags:
        if given(argv, name) and name not in allowed:
            value = getattr(args, name.removeprefix("--").replace("-", "_"), None)
            return f"{_shown(name, value)}: must be left out, --wallfacer-cp-size decides how attention is split"
    return None


def _only(name: str, allowed: object, why: str) -> Rule:
    """A rule: this argument must have this value (or be absent from this Megatron)."""

    def rule(args: Args, argv: Sequence[str]) -> str | None:
        attribute = name.removeprefix("--").replace("-", "_")
        value = getattr(args, attribute, allowed)
        if value == allowed:
            return None
        wanted = "left out" if allowed in (None, False) else allowed
        return f"{_shown(name, value)}: must be {wanted} with --wallfacer-cp-size, {why}"

    return rule


def _shown(name: str, value: object) -> str:
    """A flag and its value as they are typed."""
    if value is True:
        return name
    return f"{name} {' '.join(map(str, value)) if isinstance(value, (list, tuple)) else value}"


def _dropout(args: Args, argv: Sequence[str]) -> str | None:
    if not args.attention_dropout:
        return None
    default = "" if given(argv, "--attention-dropout") else " (Megatron's default)"
    return (
        f"--attention-dropout {args.attention_dropout}{default}: must be 0 with --wallfacer-cp-size, "
        "no kernel here can draw the same dropout again in backward"
    )


def _window(args: Args, argv: Sequence[str]) -> str | None:
    return unsupported_window(getattr(args, "window_size", None))


def _sequence_cut_across_documents(args: Args, argv: Sequence[str]) -> str | None:
    """What takes a packed sequence for one in which each document is cut, where it is not."""
    if not shards_whole_sequence(args) or args.wallfacer_cp_size == 1:
        return None
    flag, where = "--dataloader-inter-document-masking", "with --wallfacer-cp-size above 1"
    embedding = getattr(args, "position_embedding_type", None)
    if getattr(args, "apply_rope_fusion", False) and embedding == "rope":
        return f"{flag}: needs --no-rope-fusion {where}, the fused kernel turns by the angles of another cut"
    if embedding == "mrope":
        return f"--position-embedding-type mrope: must be another with {flag} {where}, its angles are of another cut"
    if getattr(args, "mtp_num_layers", None):
        return f"--mtp-num-layers {args.mtp_num_layers}: must be left out with {flag} {where}, it shifts another cut"
    return None


def _packed_through_a_pipeline(args: Args, argv: Sequence[str]) -> str | None:
    """Packed sequences of a micro-batch follow each other; what a stage is sent is shaped for them side by side."""
    flags = ("dataloader_inter_document_masking", "sft")
    packed = next((f"--{name.replace('_', '-')}" for name in flags if getattr(args, name, False)), None)
    stages, sequences = args.pipeline_model_parallel_size, getattr(args, "micro_batch_size", None) or 1
    if packed is None or stages == 1 or sequences == 1:
        return None
    return (
        f"--micro-batch-size {sequences}: must be 1 with {packed} and --pipeline-model-parallel-size {stages}, "
        "Megatron's stages are not sent packed sequences as one"
    )


def _position_bias(args: Args, argv: Sequence[str]) -> str | None:
    if getattr(args, "position_embedding_type", None) != "relative":
        return None
    return (
        "--position-embedding-type relative: must be rope, mrope, yarn, learned_absolute or none "
        "with --wallfacer-cp-size, an attention bias is not built yet"
    )


def _attention_backend(args: Args, argv: Sequence[str]) -> str | None:
    # An enum in Megatron; its names are what is typed.
    backend = getattr(getattr(args, "attention_backend", None), "name", "auto")
    if backend == "auto":
        return None
    return (
        f"--attention-backend {backend}: must be auto with --wallfacer-cp-size, --wallfacer-kernel chooses the kernel"
    )


def _attention_variant(args: Args, argv: Sequence[str]) -> str | None:
    if getattr(args, "transformer_impl", None) != "inference_optimized":
        return None
    return "--transformer-impl inference_optimized: must be local or transformer_engine with --wallfacer-cp-size"


def _bypassing_layers() -> Iterator[Rule]:
    """Layer kinds whose attention Megatron does not take from the spec provider, so that the hook never sees it."""
    why = "its attention does not pass through the plugin"
    yield _only("--heterogeneous-layers-config-path", None, why)
    yield _only("--heterogeneous-layers-config-encoded-json", None, why)
    yield _only("--experimental-attention-variant", None, why)
    yield _only("--hybrid-layer-pattern", None, why)
    yield _only("--hybrid-override-pattern", None, why)


RULES: tuple[Rule, ...] = (
    _yaml,
    _size,
    _packed_through_a_pipeline,
    _world,
    _sequence,
    _other_context_parallelism,
    _dropout,
    _window,
    _sequence_cut_across_documents,
    _only("--reset-attention-mask", False, "--dataloader-inter-document-masking keeps documents apart"),
    _only("--qk-clip", False, "it needs the largest logits"),
    _only("--log-max-attention-logit", False, "it needs the largest logits"),
    graphs_around_attention,
    _attention_backend,
    _position_bias,
    _attention_variant,
    unsupported_recompute,
    unsupported_layer_selection,
    unsupported_with_loss_tiles,
    unsupported_with_mlp_tiles,
    unsupported_with_keep_on_host,
    unsupported_with_layer_inputs,
    *_bypassing_layers(),
)
