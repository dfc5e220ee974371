"""``--wallfacer-loss-tiles`` and ``--wallfacer-mlp-tiles``: their values, and what they do not work with."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from megatron_wallfacer.errors import WallfacerError
from megatron_wallfacer.megatron.megatron_graphs import mlp_in_graphs
from megatron_wallfacer.megatron.releases import OUTPUT_PROCESSOR, version_text
from megatron_wallfacer.megatron.version import megatron_version

LOSS, MLP = "--wallfacer-loss-tiles", "--wallfacer-mlp-tiles"
#: In place of a number: :mod:`megatron_wallfacer.megatron.auto_tiles` chooses it.
AUTO = "auto"

_CHECKPOINT = "Megatron checkpoints it with a function of TransformerEngine"
_CAPTURE = "a captured graph does not recompute"
#: Values that mean that an argument is not in use, where it is not None, False or 0.
_OFF = {"mlp_chunks_for_training": 1}
#: Megatron's arguments, and why tiles do not work with them.
_BOTH = {
    "fp8": _CHECKPOINT,
    "fp4": _CHECKPOINT,
    "delay_wgrad_compute": "it computes weight gradients after backward, of the last tile only",
    "grad_reduce_in_bf16": "a sum of tiles in bf16 loses accuracy",
}
_OF_MLP = _BOTH | {
    "tp_comm_overlap": "its buffers have the size of all tokens",
    "mlp_chunks_for_training": "it divides the same tokens",
}
_OF_LOSS = _BOTH | {
    "mtp_num_layers": "multi-token prediction computes logits of its own",
    "defer_embedding_wgrad_compute": "it keeps the inputs of the head",
    "overlap_moe_expert_parallel_comm": "its schedule plan computes the loss itself",
}


def text_of(args: argparse.Namespace, flag: str) -> str | None:
    """Return the value of a flag as it was typed, None if it is not given.

    Args:
        args: parsed arguments.
        flag: :data:`LOSS` or :data:`MLP`.

    Raises:
        WallfacerError: The value is neither a positive whole number nor :data:`AUTO`.
    """
    text = getattr(args, _attribute(flag), None)
    if text is not None and text != AUTO and (not str(text).isdecimal() or int(text) < 1):
        raise WallfacerError(f"{flag} {text}: must be a positive whole number of tiles, or {AUTO}")
    return text


def tiles_of(args: argparse.Namespace, flag: str) -> int | None:
    """Return the number of tiles of a flag, None if it is not given or :data:`AUTO`.

    Raises:
        WallfacerError: as :func:`text_of`.
    """
    text = text_of(args, flag)
    return None if text is None or text == AUTO else int(text)


def unsupported_with_loss_tiles(args: argparse.Namespace, argv: Sequence[str]) -> str | None:
    """Return why a tiled loss is not supported with these arguments, or None. A rule of ``unsupported``."""
    if text_of(args, LOSS) is None:
        return None
    version = megatron_version()
    if version[:2] < OUTPUT_PROCESSOR:
        return f"{LOSS}: needs megatron-core {version_text(OUTPUT_PROCESSOR)} or newer, not {version_text(version)}"
    return _unsupported(LOSS, _OF_LOSS, args)


def unsupported_with_mlp_tiles(args: argparse.Namespace, argv: Sequence[str]) -> str | None:
    """Return why tiled MLPs are not supported with these arguments, or None. A rule of ``unsupported``."""
    if text_of(args, MLP) is None:
        return None
    modules = getattr(args, "recompute_modules", None) or ()
    if args.recompute_granularity == "selective" and "mlp" in modules:
        return f"{MLP}: must be left out with --recompute-modules mlp, each tile is recomputed already"
    held = mlp_in_graphs(args)
    if held is not None:
        return f"{MLP}: must be left out with {held}, {_CAPTURE}"
    return _unsupported(MLP, _OF_MLP, args)


def _unsupported(flag: str, reasons: dict[str, str], args: argparse.Namespace) -> str | None:
    for attribute, reason in reasons.items():
        value = getattr(args, attribute, None)
        if value and value != _OFF.get(attribute):
            other = f"--{attribute.replace('_', '-')}{'' if value is True else f' {value}'}"
            return f"{flag}: must be left out with {other}, {reason}"
    return None


def _attribute(flag: str) -> str:
    return flag.removeprefix("--").replace("-", "_")
