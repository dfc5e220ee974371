"""What ``--wallfacer-verify-every`` costs in a verified step: ``python -m benchmarks.verify``.

Per rank and layer, forward and backward together: the tensors that are sent and received, their bytes, the bytes that
checksums add, and the time of one CPU thread for the checksums of tensors of these sizes. 8 ranks, 256 tokens per
rank, 32 query heads, 8 kv heads of 128 channels, bf16.
"""

from __future__ import annotations

import time
from math import prod

import torch

from benchmarks.gpu.tables import markdown
from megatron_wallfacer.engine.verify import checksum
from megatron_wallfacer.schedule.formulas import busiest_rank
from megatron_wallfacer.schedule.heads import head_groups
from megatron_wallfacer.schedule.lower import lower
from megatron_wallfacer.schedule.mask import CAUSAL
from megatron_wallfacer.schedule.messages import MessageTensor, message_tensors
from megatron_wallfacer.schedule.plan import Plan
from megatron_wallfacer.schedule.rows import contiguous
from megatron_wallfacer.schedule.schedule import backward_schedule, forward_schedule
from megatron_wallfacer.schedule.schemes import make_plan
from megatron_wallfacer.schedule.volume import Shape

RANKS = 8
SHAPE = Shape(tokens=256, q_heads=32, kv_heads=8, head_dim=128, batch=1, itemsize=2, accumulate_itemsize=4)
SCHEMES = ("ring", "ulysses", "usp", "all-gather", "mesh", "team-ring")
#: A checksum, and the words that ranks compare before and after a pass: descriptions, finite tensors, differences.
WORD, WORDS = 8, 13


def ends(plan: Plan) -> list[MessageTensor]:
    """All tensors that the busiest rank sends and receives in both passes."""
    found: list[MessageTensor] = []
    for build in (forward_schedule, backward_schedule):
        groups = head_groups(plan, SHAPE.q_heads, SHAPE.kv_heads)
        schedule = build(plan, busiest_rank(plan), causal=True, groups=groups, keep_gathered_q=False, chunk_mask=None)
        names = ("q", "k", "v") if build is forward_schedule or plan.grid.head == 1 else ()
        names += ("dout", "out", "lse", "delta") if build is backward_schedule else ()
        strides = {name: contiguous(_own_shape(name)) for name in names}
        program = lower(schedule, SHAPE, CAUSAL, strides, varlen=False)
        for move in message_tensors(program, strides).values():
            found += [*move.sends, *move.receives]
    return found


def main() -> None:
    """Print a row per scheme."""
    torch.set_num_threads(1)
    rows = []
    for scheme in SCHEMES:
        tensors = ends(make_plan(scheme, RANKS, q_heads=SHAPE.q_heads, kv_heads=SHAPE.kv_heads, tokens=SHAPE.tokens))
        pieces = [[_random(piece.shape, piece.view) for piece in one.pieces] for one in tensors]
        nbytes = sum(piece.nbytes for some in pieces for piece in some)
        seconds = min(_seconds(pieces) for _ in range(2))
        added = WORD * (len(tensors) + 2 * 2 * RANKS * WORDS)
        row = f"{len(tensors)}", f"{nbytes / 2**20:.0f}", f"{added / 2**10:.1f}", f"{seconds * 1e3:.0f}"
        rows.append((scheme, *row, f"{nbytes / seconds / 1e9:.2f}"))
    print(markdown(("scheme", "tensors", "messages, MiB", "checksums, KiB", "CPU, ms", "GB/s"), rows))


def _seconds(pieces: list[list[torch.Tensor]]) -> float:
    start = time.thread_time()  # other processes may run
    for some in pieces:
        checksum(some)
    return time.thread_time() - start


def _own_shape(name: str) -> tuple[int, ...]:
    heads = SHAPE.kv_heads if name in ("k", "v") else SHAPE.q_heads
    rows = SHAPE.tokens, SHAPE.batch, heads
    return rows if name in ("lse", "delta") else (*rows, SHAPE.head_dim)


def _random(shape: tuple[int, ...], view: str) -> torch.Tensor:
    wide = view == "wide" or len(shape) == 3
    return (
        torch.randint(0, 255, (prod(shape) * (4 if wide else 2),), dtype=torch.uint8)
        .view(torch.float32 if wide else torch.bfloat16)
        .view(shape)
    )


if __name__ == "__main__":
    main()
