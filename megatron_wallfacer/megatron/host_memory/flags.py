"""``--wallfacer-keep-on-host`` and ``--wallfacer-layer-inputs-on-host``: values, and what they do not work with."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Literal

from megatron_wallfacer.errors import WallfacerError
from megatron_wallfacer.megatron.megatron_graphs import attention_in_graphs, mlp_in_graphs

KEEP, INPUTS = "--wallfacer-keep-on-host", "--wallfacer-layer-inputs-on-host"
#: Part of the layers; ``auto``: as many as host memory has room for.
Fraction = float | Literal["auto"]

#: Megatron's arguments, and why no activation can be in host memory with them.
_BOTH = {
    "fine_grained_activation_offloading": "it moves activations to host memory itself",
    "cpu_offloading": "it moves activations to host memory itself",
    "cpu_offloading_num_layers": "it moves activations to host memory itself",
    "overlap_moe_expert_parallel_comm": "layers of two micro-batches run in turns",
}
_CHECKPOINT = "Megatron checkpoints it with a function of TransformerEngine"
_OF_INPUTS = _BOTH | {
    "fp8": _CHECKPOINT,
    "fp4": _CHECKPOINT,
    "distribute_saved_activations": "layer inputs are distributed over tensor-parallel ranks",
}


def fraction_of(args: argparse.Namespace, flag: str) -> Fraction | None:
    """Return the value of a flag, None if it is not given.

    Args:
        args: parsed arguments.
        flag: :data:`KEEP` or :data:`INPUTS`.

    Raises:
        WallfacerError: The value is neither ``auto`` nor a number above 0 and at most 1.
    """
    text = getattr(args, flag.removeprefix("--").replace("-", "_"), None)
    if text is None or text == "auto":
        return text
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise WallfacerError(f"{flag} {text}: must be auto, or a part of the layers above 0 and at most 1")
    return value


def unsupported_with_keep_on_host(args: argparse.Namespace, argv: Sequence[str]) -> str | None:
    """Return why kept outputs cannot be in host memory with these arguments, or None. A rule of ``unsupported``."""
    value = fraction_of(args, KEEP)
    if value is None:
        return None
    if not args.wallfacer_keep_attention_output:
        return f"{KEEP} {value}: needs --wallfacer-keep-attention-output, without it no output is kept"
    return _unsupported(KEEP, value, _BOTH, args)


def unsupported_with_layer_inputs(args: argparse.Namespace, argv: Sequence[str]) -> str | None:
    """Return why layer inputs cannot be in host memory with these arguments, or None. A rule of ``unsupported``."""
    value = fraction_of(args, INPUTS)
    if value is None:
        return None
    if args.recompute_granularity != "full":
        return f"{INPUTS} {value}: needs --recompute-granularity full, without it more than layer inputs is saved"
    graphs = attention_in_graphs(args) or mlp_in_graphs(args)
    if graphs is not None:
        return f"{INPUTS} {value}: must be left out with {graphs}, a captured graph does not recompute"
    return _unsupported(INPUTS, value, _OF_INPUTS, args)


def _unsupported(flag: str, value: Fraction, reasons: dict[str, str], args: argparse.Namespace) -> str | None:
    for attribute, reason in reasons.items():
        found = getattr(args, attribute, None)
        if found:
            other = f"--{attribute.replace('_', '-')}{'' if found is True else f' {found}'}"
            return f"{flag} {value}: must be left out with {other}, {reason}"
    return None
