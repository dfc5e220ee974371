"""Kept attention outputs in host memory against the device: step time, memory, equal gradients, copies under kernels.

    python -m benchmarks.gpu.on_host            on a GPU: one rank of P 8, its messages not sent, six layers
    python -m benchmarks.gpu.on_host --smoke    anywhere; on a CPU copies run when they are waited for, nothing is timed

Each layer is attention under a checkpoint that keeps its output (``--wallfacer-keep-attention-output``); the copies are
those of ``--wallfacer-keep-on-host 1``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from benchmarks.gpu.clock import medians
from benchmarks.gpu.memory import added_bytes
from benchmarks.gpu.one_rank import OneRank
from benchmarks.gpu.profiled import busy, copies_under_kernels, save_trace
from benchmarks.gpu.report import add_options, device_of, kernel_of
from benchmarks.gpu.rows import Rows
from megatron_wallfacer.megatron.flags import KEEP
from megatron_wallfacer.megatron.host_memory.attention import keep_on_host, kept_sizes
from megatron_wallfacer.megatron.host_memory.prepare import copies_of
from megatron_wallfacer.megatron.keep import Keeper
from megatron_wallfacer.offload.host import HostSlots, slot_bytes
from megatron_wallfacer.offload.order import Pipeline, passes_of_step
from megatron_wallfacer.offload.queue import OffloadQueue
from megatron_wallfacer.offload.slots import assign_slots, uses_of_step
from megatron_wallfacer.schedule.schemes import make_plan

HEADS = (32, 8)
#: Keeping on the host may take this much longer, and free memory may differ by this part.
SLOWER, ALLOWED = 1.03, 0.1
#: Layers whose outputs the device holds in backward: in use, and on the way.
HELD = 2
_MIB = 1 << 20


class Layers:
    """Layers of attention, each recomputed in backward with its output kept.

    Args:
        one: rank that runs them.
        count: number of layers.
        on_host: whether outputs are kept in host memory.
    """

    def __init__(self, one: OneRank, count: int, *, on_host: bool) -> None:
        self._one = one
        self._keepers = [Keeper(f"layer {number}") for number in range(1, count + 1)]
        if on_host:
            uses = uses_of_step(passes_of_step(Pipeline(), 1), {0: [(layer,) for layer in range(count)]})
            nbytes = slot_bytes(kept_sizes(one.call, one.shape))
            plan = assign_slots(uses, {(0, layer): nbytes for layer in range(count)})
            slots = HostSlots(plan.slots.values(), pinned=one.device.type == "cuda")
            queue = OffloadQueue(KEEP, lambda _: plan, lambda: 1, slots, copies_of(one.device))
            for layer, keeper in enumerate(self._keepers):
                keeper.hold = partial(keep_on_host, queue, 0, layer)

    def step(self, q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> list[Tensor]:
        """Run all layers forward and backward.

        Returns:
            dq, dk, dv.
        """
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        total = torch.zeros_like(dout)
        for keeper in self._keepers:
            # Not one layer after the other: received rows are whatever their memory held, and may be no numbers.
            total = total + checkpoint(partial(self._attend, keeper), *leaves, use_reentrant=True)
        total.backward(dout)
        return [x.grad for x in leaves]

    def _attend(self, keeper: Keeper, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return keeper.attend(q, k, v, self._one.call)


def measure(scheme: str, options: argparse.Namespace) -> Iterator[tuple[str, ...]]:
    """Both places for one scheme.

    Raises:
        OptionError: it cannot be had for these heads.
    """
    device, dtype = device_of(options), getattr(torch, options.dtype)
    plan = make_plan(scheme, options.cp_size, q_heads=HEADS[0], kv_heads=HEADS[1])
    one = OneRank(plan, options.tokens, HEADS, options.head_dim, kernel_of(options, device, dtype), device, dtype)
    tensors = one.inputs()
    places = {name: Layers(one, options.layers, on_host=name == "host") for name in ("device", "host")}
    # Received rows are whatever their memory held, so gradients are compared only where nothing is received.
    alone = options.cp_size == 1
    found = {name: layers.step(*tensors) for name, layers in places.items()} if alone else {}
    equal = not alone or all(map(torch.equal, found["device"], found["host"]))
    del found
    works = {name: partial(layers.step, *tensors) for name, layers in places.items()}
    times = medians(works, device, options.repeats)
    # After the first runs, which allocate what later ones use again.
    peaks = {name: added_bytes(work) for name, work in works.items()} if device.type == "cuda" else {}
    hidden = _hidden(works["host"], device, scheme, options) if device.type == "cuda" else None
    ratio = times["host"] / times["device"]
    expected = (options.layers - HELD) * sum(kept_sizes(one.call, one.shape))
    freed = peaks["device"] - peaks["host"] if peaks else None
    yield (
        str(plan.grid),
        *(f"{1e3 * times[name]:.1f}" for name in ("device", "host")),
        f"{ratio:.3f}",
        f"{expected / _MIB:.1f}",
        "-" if freed is None else f"{freed / _MIB:.1f}",
        "-" if hidden is None else f"{hidden:.3f}",
        verdict_of(equal=equal, ratio=ratio, freed=freed, expected=expected),
    )


def _hidden(work: Callable[[], object], device: torch.device, scheme: str, options: argparse.Namespace) -> float | None:
    """Part of the time of copies in which a kernel ran; the timeline is saved."""
    trace = (options.out or Path("runs/gpu")) / f"on-host-p{options.cp_size}-{scheme}.json"
    save_trace(work, device, trace)
    return copies_under_kernels(busy(trace, device=device.type))


def verdict_of(*, equal: bool, ratio: float, freed: int | None, expected: int) -> str:
    """Return the verdict of a row; ``freed`` is None where nothing is measured."""
    if not equal:
        return "wrong: gradients differ"
    if freed is None:
        return "ok: not measured"
    if ratio > SLOWER:
        return f"over: more than {SLOWER} times as long"
    return "ok" if abs(freed / expected - 1) <= ALLOWED else "over: frees other than expected"


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print and save; 1 if a row is not as it must be."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add_options(parser)
    parser.add_argument("--tokens", type=int, default=1 << 18, help="tokens of the whole sequence (default: 256K)")
    parser.add_argument("--layers", type=int, default=6, help="layers (default: 6)")
    options = parser.parse_args(argv)
    if options.smoke:
        options.tokens, options.head_dim, options.layers, options.repeats = 256, 32, 4, 1
    values = "grid", "device ms", "host ms", "ratio", "expected MiB", "freed MiB", "copies under kernels"
    rows = Rows("on-host", ("P", "scheme", "tokens"), values, options)
    whole = options.tokens
    for cp_size, scheme in ((1, "ring"), (8, "ring"), (8, "ulysses")):
        options.cp_size = cp_size
        # As many tokens per rank.
        options.tokens = whole * cp_size // 8
        rows.measure((cp_size, scheme, f"{options.tokens / 1024:g}K"), partial(measure, scheme, options))
    return rows.close()


if __name__ == "__main__":
    sys.exit(main())
