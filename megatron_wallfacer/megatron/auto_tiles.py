"""Choose the number of tiles for ``--wallfacer-loss-tiles auto`` and ``--wallfacer-mlp-tiles auto``.

``auto`` doubles the number of tiles until more tiles no longer lower the peak of activation memory. The
choice reads only the command line, so every rank makes the same choice. The prediction of memory assumes fused norms,
fused SwiGLU, and one pipeline stage with all layers of the model.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace

from megatron_wallfacer.errors import WallfacerError
from megatron_wallfacer.megatron.flags import AUTO, flag_name
from megatron_wallfacer.megatron.model_shape import dtype_of, head_dim, kv_heads, shape_of
from megatron_wallfacer.megatron.settings import Settings
from megatron_wallfacer.planning.attention_memory import busiest_rank_memory
from megatron_wallfacer.planning.inventory import Activations, inventory, peak
from megatron_wallfacer.planning.model import Model, Recompute
from megatron_wallfacer.planning.token_tiles import recomputed_part, tiled

#: Megatron pads the vocabulary to a multiple of this by default, times the tensor-parallel size.
_DIVISIBLE_BY = 128


@dataclass(frozen=True)
class ChosenTiles:
    """Activation memory of one rank with one tile and with the number of tiles that ``auto`` chooses.

    Attributes:
        before: activations if every flag that is ``auto`` were 1.
        after: activations with the chosen numbers of tiles.
    """

    before: Activations
    after: Activations

    def text(self) -> str:
        """Return sentences with the number of tiles, the peak of activation memory and the additional work."""
        (_, most), (_, least) = (peak(inventory(work)) for work in (self.before, self.after))
        return (
            f"The number of tiles is {self.after.loss_tiles} for head and loss, and {self.after.mlp_tiles} for each "
            f"MLP. Activations take {least / 1e9:.2f} GB per rank instead of {most / 1e9:.2f} GB with one tile. "
            f"Matrix multiplications take {100 * recomputed_part(self.after):.0f} % more work."
        )


def choose_tiles(settings: Settings, args: argparse.Namespace) -> tuple[Settings, ChosenTiles | None]:
    """Return the settings with numbers in place of ``auto``. Without ``auto`` the returned activations are None.

    Raises:
        WallfacerError: A flag is ``auto``, but the command line lacks a model size or the layers are not dense.
    """
    open_ = [name for name in ("loss_tiles", "mlp_tiles") if getattr(settings.flags, name) == AUTO]
    if not open_:
        return settings, None
    before = _activations(settings, args, flag_name(open_[0]))
    after = tiled(before, loss="loss_tiles" in open_, mlp="mlp_tiles" in open_)
    # One tile has all tokens, so None avoids the recomputation in backward.
    numbers = {name: getattr(after, name) for name in open_}
    chosen = {name: number if number > 1 else None for name, number in numbers.items()}
    return replace(settings, flags=replace(settings.flags, **chosen)), ChosenTiles(before, after)


def _activations(settings: Settings, args: argparse.Namespace, flag: str) -> Activations:
    shape, size = shape_of(args, dtype_of(args)), _model(args, flag)
    flags = settings.flags
    passes = {"keep_gathered_q": flags.keep_gathered_q, "cuda_graphs": flags.cuda_graphs}
    loss, mlp = (1 if tiles in (None, AUTO) else tiles for tiles in (flags.loss_tiles, flags.mlp_tiles))
    return Activations(
        size,
        shape.tokens * shape.batch,
        tp=args.tensor_model_parallel_size,
        layers=size.layers,
        recompute=_recompute(settings, args),
        loss_tiles=loss,
        mlp_tiles=mlp,
        attention=busiest_rank_memory(settings.plan, shape, **passes),
        fused_gradients=args.gradient_accumulation_fusion,
    )


def _model(args: argparse.Namespace, flag: str) -> Model:
    for name in ("num_layers", "hidden_size", "seq_length", "vocab_size"):
        if getattr(args, name, None) is None:
            raise WallfacerError(
                f"{flag} {AUTO}: needs --{name.replace('_', '-')} on the command line, or a number here"
            )
    if getattr(args, "num_experts", None) or getattr(args, "multi_latent_attention", False):
        raise WallfacerError(
            f"{flag} {AUTO}: must be a number, because {AUTO} does not support experts or latent attention"
        )
    hidden = args.hidden_size
    # Megatron's default for --ffn-hidden-size.
    usual = int(4 * hidden * 2 / 3 / 64) * 64 if args.swiglu else 4 * hidden
    multiple = (args.make_vocab_size_divisible_by or _DIVISIBLE_BY) * args.tensor_model_parallel_size
    return Model(
        "of the command line",
        layers=args.num_layers,
        hidden=hidden,
        ffn_hidden=args.ffn_hidden_size or usual,
        q_heads=args.num_attention_heads,
        kv_heads=kv_heads(args),
        head_dim=head_dim(args),
        vocabulary=-(-args.vocab_size // multiple) * multiple,
        swiglu=args.swiglu,
    )


def _recompute(settings: Settings, args: argparse.Namespace) -> Recompute:
    if args.recompute_granularity != "full":
        return "none"
    return "keep-attention" if settings.flags.keep_attention_output else "full"
