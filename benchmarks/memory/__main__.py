"""Memory of one training step, counted on Megatron's model and listed by the planner's inventory.

    python -m benchmarks.memory --mlp-tiles 16 --loss-tiles 128

Tensors have no memory, so any machine counts any size. Sizes are GB (1e9 bytes) per rank, without parameters, their
gradients and optimizer states.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from benchmarks.gpu.tables import markdown
from benchmarks.memory.live import Peak
from megatron_wallfacer.planning.attention_memory import busiest_rank_memory
from megatron_wallfacer.planning.inventory import MOMENTS, Activations, Moment, bytes_at, inventory
from megatron_wallfacer.planning.model import MODELS, RECOMPUTE, Model
from megatron_wallfacer.schedule.plan import Plan
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


def activations(model: Model, plan: Plan, tokens: int, **options: Any) -> Activations:
    """Return what one rank does, with what its attention allocates.

    Args:
        model: of the training.
        plan: of attention.
        tokens: tokens per context-parallel rank.
        options: others of :class:`Activations`.
    """
    work = Activations(model, tokens, fused_gradients=False, **options)
    return replace(work, attention=busiest_rank_memory(plan, model.shape(tokens, tp=work.tp)))


def compared(work: Activations, plan: Plan) -> dict[Moment, tuple[Peak, float]]:
    """Return by moment the peak that was counted and the bytes of the inventory."""
    from benchmarks.memory.model import Setting, count

    counted, listed = count(Setting(work, plan)), inventory(work)
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
        for buffer in peak.buffers[:top]:
            print(f"  {moment}: {buffer.nbytes / 1e9:7.3f} GB {buffer.shape} {buffer.made_by}", file=sys.stderr)


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


def count_one(options: argparse.Namespace) -> bool:
    """Count and print one configuration; return whether the inventory holds."""
    model = MODELS[options.model]
    heads = {"q_heads": model.q_heads // options.tp, "kv_heads": model.kv_heads // options.tp}
    plan = make_plan(options.scheme, options.cp, **heads)
    tiles = {"loss_tiles": options.loss_tiles, "mlp_tiles": options.mlp_tiles}
    chosen = {"tp": options.tp, "layers": options.layers, "recompute": options.recompute, **tiles}
    moments = compared(activations(model, plan, options.tokens, **chosen), plan)
    show(moments, options.top)
    return within_tolerance(moments)


def main(argv: Sequence[str] | None = None) -> int:
    """Count one configuration, or all that are checked, and print them beside the inventory."""
    options = parser().parse_args(argv)
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
