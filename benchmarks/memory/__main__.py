"""Memory of one training step, counted on Megatron's model and listed by the planner's inventory.

    python -m benchmarks.memory --mlp-tiles 16 --loss-tiles 128
    python -m benchmarks.memory --ranks

Tensors have no memory, so any machine counts any size. With ``--ranks`` a small model is trained for a step on gloo
ranks, with real tensors, kernels and messages. Sizes are per rank, without parameters, their gradients and optimizer
states.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import cast

from benchmarks.gpu.tables import markdown
from benchmarks.memory.live import Peak
from benchmarks.memory.setting import Setting, step_setting
from megatron_wallfacer.planning.inventory import MOMENTS, Moment, bytes_at, inventory
from megatron_wallfacer.planning.model import MODELS, RECOMPUTE, Model
from megatron_wallfacer.schedule.schemes import make_plan

HEADING = ("moment", "counted GB", "inventory GB", "inventory / counted")
#: At the peak of a step the inventory may differ from the count by this part; at other moments by twice as much.
TOLERANCE = 0.05
#: What ``--check`` compares: recomputation, tiles, tensor parallelism and schemes.
CHECKED = (
    "--mlp-tiles 16 --loss-tiles 128",
    "--recompute keep-attention --mlp-tiles 16 --loss-tiles 128 --scheme usp",
    "--recompute none --layers 3",
    "--tp 2 --cp 4 --tokens 262144 --mlp-tiles 16 --loss-tiles 128",
    "--tp 2 --cp 4 --recompute none",
    "--recompute none --mlp-tiles 7 --loss-tiles 5 --scheme team-ring",
)
#: Gloo ranks of ``--ranks``, and their model. Tokens outweigh its weights, so that gradients of weights, which are
#: counted until they are added to Megatron's gradient buffer, are small beside activations.
RANKS, RANK_TOKENS = 4, 2048
SMALL = replace(MODELS["llama3-8b"], hidden=128, q_heads=8, kv_heads=4, head_dim=16, ffn_hidden=384, vocabulary=2048)
#: What ``--ranks`` compares: recomputation, tiles, context and tensor parallelism, norms of PyTorch.
CHECKED_ON_RANKS = (
    "--cp 4 --recompute keep-attention --scheme ulysses --mlp-tiles 8 --loss-tiles 16",
    "--cp 2 --tp 2 --recompute full --mlp-tiles 4 --loss-tiles 8",
    "--cp 4 --recompute none --unfused-norms",
    "--cp 4 --recompute none --scheme team-ring",
    "--cp 2 --recompute none --layers 3",
    "--cp 2 --recompute none --mlp-tiles 7 --loss-tiles 5",
    "--cp 2 --tp 2 --recompute none",
    "--cp 1 --tp 4 --recompute none --loss-tiles 4",
    "--cp 4 --recompute full",
    "--cp 4 --recompute full --mlp-tiles 8 --loss-tiles 16",
    "--cp 4 --recompute full --scheme wallfacer --mlp-tiles 8 --loss-tiles 16",
    "--cp 1 --recompute full --mlp-tiles 4 --loss-tiles 8",
    "--cp 4 --recompute keep-attention --layers 3 --mlp-tiles 8 --loss-tiles 16",
    "--cp 2 --tp 2 --recompute keep-attention --layers 4 --loss-tiles 4",
    "--cp 4 --recompute full --mlp-tiles 8 --loss-tiles 16 --unfused-norms",
)


def compared(setting: Setting) -> dict[Moment, tuple[Peak, float]]:
    """Return by moment the peak that was counted and the bytes of the inventory."""
    from benchmarks.memory.one_rank import count

    counted, listed = count(setting), inventory(setting.work)
    return {moment: (counted[moment], bytes_at(listed, moment)) for moment in MOMENTS}


def within_tolerance(moments: dict[Moment, tuple[Peak, float]]) -> bool:
    """Return whether the inventory holds, at the peak and at the other moments."""
    highest = max(moments, key=lambda moment: moments[moment][0].nbytes)
    return all(
        abs(expected / peak.nbytes - 1) <= TOLERANCE * (1 if moment == highest else 2)
        for moment, (peak, expected) in moments.items()
    )


def show(moments: dict[Moment, tuple[Peak, float]], top: int) -> None:
    """Print one line per moment, and the largest live buffers of each on stderr."""
    sizes = {moment: (peak.nbytes, expected) for moment, (peak, expected) in moments.items()}
    lines = [(name, f"{a / 1e9:.2f}", f"{b / 1e9:.2f}", f"{b / a:.3f}") for name, (a, b) in sizes.items()]
    print(markdown(HEADING, lines), flush=True)
    for moment, (peak, _) in moments.items():
        name_buffers(moment, peak, top)


def name_buffers(place: str, peak: Peak, top: int) -> None:
    """Print the largest live buffers of a peak on stderr."""
    for buffer in peak.buffers[:top]:
        print(f"  {place}: {buffer.nbytes / 1e6:10.3f} MB {buffer.shape} {buffer.made_by}", file=sys.stderr)


def compare_on_ranks(number: int, top: int) -> int:
    """Count a step on gloo ranks, print the peak of the busiest rank; return how many are out of tolerance."""
    from benchmarks.memory.ranks import count_all

    texts = CHECKED_ON_RANKS[:number]
    settings = [setting_of(parser().parse_args(text.split()), SMALL, RANK_TOKENS) for text in texts]
    lines, wrong = [], 0
    for text, setting, counted in zip(texts, settings, count_all(settings, RANKS), strict=True):
        moment = max(counted, key=lambda name: counted[name].nbytes)
        peak, expected = counted[moment].nbytes, bytes_at(inventory(setting.work), cast("Moment", moment))
        wrong += abs(expected / peak - 1) > TOLERANCE
        name_buffers(text, counted[moment], top)
        lines.append((text, moment, f"{peak / 1e6:.2f}", f"{expected / 1e6:.2f}", f"{expected / peak:.3f}"))
    print(markdown(("step", "moment of the peak", "counted MB", "inventory MB", "inventory / counted"), lines))
    return wrong


def parser() -> argparse.ArgumentParser:
    """Return the command's parser."""
    made = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__.partition("\n")[0])
    add = made.add_argument
    add("--model", choices=MODELS, default="llama3-8b")
    add("--tokens", type=int, default=131072, help="tokens per context-parallel rank (default: 131072)")
    add("--layers", type=int, default=2, help="layers of the model (default: 2)")
    add("--cp", type=int, default=8, help="context-parallel ranks (default: 8)")
    add("--tp", type=int, default=1, help="tensor-parallel ranks, with sequence parallelism (default: 1)")
    add("--scheme", default="ring", help="of attention (default: ring)")
    add("--recompute", choices=RECOMPUTE, default="full", help="what backward computes again (default: full)")
    add("--loss-tiles", type=int, default=1, help="tiles of head and loss (default: 1)")
    add("--mlp-tiles", type=int, default=1, help="tiles of each MLP (default: 1)")
    add("--unfused-norms", action="store_true", help="norms of PyTorch instead of fused ones")
    add(
        "--ranks",
        type=int,
        nargs="?",
        const=len(CHECKED_ON_RANKS),
        metavar="N",
        help="compare N steps of a small model on gloo ranks; exit 1",
    )
    add("--top", type=int, default=10, help="largest buffers to name at each peak (default: 10)")
    add(
        "--check",
        type=int,
        nargs="?",
        const=len(CHECKED),
        metavar="N",
        help="compare N standard configurations; exit 1",
    )
    return made


def setting_of(options: argparse.Namespace, model: Model, tokens: int) -> Setting:
    """Return what the options describe, with a model and tokens per context-parallel rank."""
    heads = {"q_heads": model.q_heads // options.tp, "kv_heads": model.kv_heads // options.tp}
    plan = make_plan(options.scheme, options.cp, **heads)
    names = ("tp", "layers", "recompute", "loss_tiles", "mlp_tiles")
    chosen = {name: getattr(options, name) for name in names}
    return step_setting(model, plan, tokens, fused_norms=not options.unfused_norms, **chosen)


def count_one(options: argparse.Namespace) -> bool:
    """Count and print one configuration; return whether the inventory holds."""
    moments = compared(setting_of(options, MODELS[options.model], options.tokens))
    show(moments, options.top)
    return within_tolerance(moments)


def main(argv: Sequence[str] | None = None) -> int:
    """Count one configuration, or all that are checked, and print them beside the inventory."""
    options = parser().parse_args(argv)
    if options.ranks is not None:
        wrong = compare_on_ranks(options.ranks, options.top)
        print(f"\n{wrong} of {options.ranks} steps are out of tolerance")
        return min(wrong, 1)
    from megatron_wallfacer.megatron import any_device, cpu_runtime

    cpu_runtime.install()
    any_device.install()
    if options.check is None:
        count_one(options)
        return 0
    wrong = 0
    for text in CHECKED[: options.check]:
        print(f"\n{text}\n", flush=True)
        wrong += not count_one(parser().parse_args([*text.split(), "--top", "0"]))
    print(f"\n{wrong} of {options.check} configurations are out of tolerance")
    return min(wrong, 1)


if __name__ == "__main__":
    sys.exit(main())
