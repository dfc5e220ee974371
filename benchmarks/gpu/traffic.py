"""What a rank moves through memory beside its attention kernels, counted on any machine: nothing is run or timed.

    python -m benchmarks.gpu.traffic                                   as the engine is on a GPU
    python -m benchmarks.gpu.traffic --operators                       as PyTorch's operators would do the same
    python -m benchmarks.gpu.traffic --memory-gbyte-s 4300             at another rate
    python -m benchmarks.gpu.traffic --launches                        launches, and whether they are within the limits

Both passes run on tensors without memory. Each operator is taken to read its inputs and write its outputs once, and so
is each kernel of ``megatron_wallfacer.engine``. ``forward`` and ``backward`` are kernels over kernels and the
rest, at the rates that are given: what :mod:`benchmarks.gpu.efficiency` can measure at best. Launches, and kernels that
are slower on small tiles, come on top.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from math import prod
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.gpu.no_kernel import NoKernel
from benchmarks.gpu.one_rank import OneRank
from benchmarks.gpu.report import add_table_options, head_counts
from benchmarks.gpu.rows import Rows
from benchmarks.gpu.settings import COLUMNS, HEADS, Setting, settings
from megatron_wallfacer.engine import merge, operators, row_lists
from megatron_wallfacer.engine.row_table import RowOperation
from megatron_wallfacer.planning.costs import BACKWARD_FLOPS, FORWARD_FLOPS
from megatron_wallfacer.schedule.program import Program
from megatron_wallfacer.schedule.schemes import make_plan

#: Attention kernels forward and backward, and memory: what FlashAttention 3 and large copies reach on an H100, as
#: published; the second memory is an H200's.
TFLOPS, MEMORY_GBYTE_S = (600.0, 480.0), (3000.0, 4300.0)
#: Written, and not read.
_WRITTEN_ONLY = ("copy_", "fill_", "zero_", "normal_")


class Traffic(TorchDispatchMode):
    """Counts bytes that operators read and write, and their launches.

    Args:
        doing: names of the operation of the schedule that runs, in its only item.

    Attributes:
        bytes: by operator.
        launches: by operation of the schedule and operator.
    """

    def __init__(self, doing: Sequence[str] = ("Pass",)) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()
        self.launches: Counter[tuple[str, str]] = Counter()
        self._doing = doing

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        given, made = ([x for x in tree_leaves(tree) if isinstance(x, Tensor)] for tree in ((args, kwargs), result))
        space, _, name = func._schema.name.partition("::")
        views = not func._schema.is_mutable and {x.untyped_storage()._cdata for x in given}.intersection(
            x.untyped_storage()._cdata for x in made
        )
        if name.startswith("_foreach"):
            into, sources = args[:2]
            self.add(name, sources if name == "_foreach_copy_" else (*into, *sources), into)
        elif name == "index_select":
            # It reads as many elements as it writes, of a source that may have more.
            self.add(name, (*made, given[1]), made)
        elif space == "aten" and not views and "empty" not in name:
            self.add(name, given[name in _WRITTEN_ONLY :], made)
        return result

    def add(self, name: str, read: Sequence[Tensor], written: Sequence[Tensor]) -> None:
        """Count tensors that are read and written once."""
        self._add(name, sum(x.nbytes for x in (*read, *written)))

    def _add(self, name: str, nbytes: int) -> None:
        self.bytes[name] += nbytes
        self.launches[self._doing[0], name] += 1

    def list_kernels(self) -> SimpleNamespace:
        """In place of :mod:`megatron_wallfacer.engine.triton_rows`."""

        def row_launch(table: SimpleNamespace, *, merges: bool) -> Callable[[Sequence[Tensor]], None]:
            name = "merges" if merges else "copies" if table.sources == 1 else "sums"
            # Launches are made in the first run and counted in later ones.
            return lambda tensors: row_lists.kernels().note(name, table.nbytes)

        return SimpleNamespace(RowLaunch=row_launch, note=self._add)

    def kernels(self) -> SimpleNamespace:
        """In place of :mod:`megatron_wallfacer.engine.triton_proxy`: counted as kernels that touch everything once."""

        def row_sums(dout: Tensor, out: Tensor, dtype: torch.dtype) -> Tensor:
            delta = torch.empty(dout.shape[:3], dtype=dtype, device=dout.device)
            self.add("row sums", (dout, out), (delta,))
            return delta

        def out_proxy(dout: Tensor, delta: Tensor, proxy: Tensor) -> None:
            self.add("out proxy", (dout, delta), (proxy,))

        return SimpleNamespace(row_sums=row_sums, out_proxy=out_proxy)


def byte_table(operations: Sequence[RowOperation], dtype: torch.dtype, wide: torch.dtype, _: object) -> SimpleNamespace:
    """In place of :func:`megatron_wallfacer.engine.row_table.make_table`: largest number of sources, and bytes."""
    nbytes = sum(
        elements * (wide if place.wide else dtype).itemsize
        for one in operations
        for places in (one.into, *one.sources)
        # The statistics of a merge have no channels.
        for elements, place in zip((prod(one.shape), prod(one.shape[:-1])), places, strict=False)
        if place.base >= 0
    )
    return SimpleNamespace(sources=max(len(one.sources) for one in operations), nbytes=nbytes)


@dataclass(frozen=True)
class Passes:
    """Of one rank of one scheme.

    Attributes:
        grid: of the scheme.
        bytes: beside kernels, by operator: (forward, backward).
        flops: of the kernels: (forward, backward).
    """

    grid: str
    bytes: tuple[Counter[str], Counter[str]]
    flops: tuple[float, float]

    def efficiency(self, tflops: Sequence[float], memory_gbyte_s: float) -> tuple[float, float]:
        """(forward, backward): time of the kernels over that of kernels and the rest, at such rates."""
        found = []
        for moved, flops, rate in zip(self.bytes, self.flops, tflops, strict=True):
            kernels, rest = flops / (rate * 1e12), moved.total() / (memory_gbyte_s * 1e9)
            found.append(kernels / (kernels + rest))
        return found[0], found[1]


def count(
    cp_size: int, tokens: int, heads: tuple[int, int], scheme: str, *, head_dim: int = 128, operators_only: bool = False
) -> Passes:
    """Both passes of the busiest rank, bf16, causal.

    Raises:
        OptionError: the scheme cannot be had for these heads.
    """
    ran = run(cp_size, heads, scheme, head_dim, tokens // cp_size, operators_only)
    moved = [Counter({name: size * tokens // (2 * cp_size) for name, size in one.bytes.items()}) for one in ran.seen]
    pairs = tokens * tokens / 2 / cp_size * heads[0] * head_dim
    return Passes(ran.grid, (moved[0], moved[1]), (FORWARD_FLOPS * pairs, BACKWARD_FLOPS * pairs))


@dataclass(frozen=True)
class Run:
    """Both passes of one rank with one token in each chunk.

    Attributes:
        grid: of the scheme.
        seen: forward and backward.
        programs: of both.
    """

    grid: str
    seen: tuple[Traffic, Traffic]
    programs: tuple[Program, Program]


@lru_cache(maxsize=64)
def run(
    cp_size: int,
    heads: tuple[int, int],
    scheme: str,
    head_dim: int,
    rank_tokens: int,
    operators_only: bool = False,
) -> Run:
    """Run both passes of the busiest rank, bf16, causal. Bytes grow with the tokens of a chunk; launches do not.

    Args:
        cp_size: ranks.
        heads: (query, kv).
        scheme: by name.
        head_dim: channels of a head.
        rank_tokens: tokens per rank for which the grid is chosen.
        operators_only: without kernels of the package.

    Raises:
        OptionError: the scheme cannot be had for these heads.
    """
    plan = make_plan(scheme, cp_size, q_heads=heads[0], kv_heads=heads[1], tokens=rank_tokens)
    # Where a kernel of ours would be called is decided by the device; no memory is touched on either.
    device = torch.device("cpu" if operators_only else "cuda")
    doing = ["Pass"]

    @contextmanager
    def noted(what: object) -> Iterator[None]:
        before, doing[0] = doing[0], type(what).__name__
        yield
        doing[0] = before

    with FakeTensorMode():
        one = OneRank(plan, 2 * cp_size, heads, head_dim, NoKernel(), device, observer=noted)
        q, k, v, dout = one.inputs()
        inputs = [] if plan.grid.head > 1 else [q, k, v]
        # The first run fills what the second uses again.
        for _ in range(2):
            with _counted(doing) as forward:
                out, lse, kept = operators.run_attention(q, k, v, None, one.call.number)
            with _counted(doing) as backward:
                operators.run_attention_backward(
                    dout, out, lse, None, kept, inputs, heads[1], head_dim, one.call.number
                )
        own = dict(zip("qkv", inputs, strict=False)) | {"dout": dout, "out": out, "lse": lse}
        compiled = one.call.forward_pass(q, k, v, sinks=False), one.call.backward_pass(own, heads[1], head_dim)
    return Run(str(plan.grid), (forward, backward), (compiled[0].program, compiled[1].program))


@contextmanager
def _counted(doing: Sequence[str]) -> Iterator[Traffic]:
    with (
        Traffic(doing) as traffic,
        mock.patch.object(merge, "kernels", traffic.kernels),
        mock.patch.object(row_lists, "kernels", traffic.list_kernels),
        mock.patch.object(row_lists, "make_table", byte_table),
    ):
        yield traffic


def measure(setting: Setting, options: argparse.Namespace) -> Iterator[tuple[str, ...]]:
    """Bytes and the best efficiency of one rank at the given rates.

    Raises:
        OptionError: the scheme cannot be had for these heads.
    """
    passes = count(setting.cp_size, setting.tokens, setting.heads, options.scheme, operators_only=options.operators)
    shares = [share for rate in options.memory_gbyte_s for share in passes.efficiency(options.tflops, rate)]
    moved = [f"{one.total() / 2**20:.0f}" for one in passes.bytes]
    if options.most:
        for one in passes.bytes:
            print({name: f"{size / 2**20:.0f} MiB" for name, size in one.most_common(5)}, file=sys.stderr)
    yield passes.grid, *moved, *(f"{share:.3f}" for share in shares), ""


def main(argv: Sequence[str] | None = None) -> int:
    """Count, print and save one row per setting."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add_table_options(parser)
    parser.add_argument("--cp-size", type=int, nargs="+", help="(default: 8, 4, 2, 64, 512)")
    parser.add_argument("--tokens", type=int, nargs="+", help="tokens of the whole sequence")
    parser.add_argument("--heads", type=head_counts, nargs="+", default=HEADS, metavar="Q,KV")
    parser.add_argument("--scheme", default="team-ring")
    parser.add_argument("--operators", action="store_true", help="without kernels of our own")
    parser.add_argument("--tflops", type=float, nargs=2, default=TFLOPS, metavar=("FORWARD", "BACKWARD"))
    parser.add_argument("--memory-gbyte-s", type=float, nargs="+", default=MEMORY_GBYTE_S)
    parser.add_argument("--launches", action="store_true", help="count launches; exit with 1 above a limit")
    parser.add_argument("--kinds", action="store_true", help="with --launches: by operation and kernel")
    parser.add_argument("--most", action="store_true", help="name the operators that move most")
    options = parser.parse_args(argv)
    if options.smoke:
        options.cp_size, options.tokens, options.heads = (8,), (2048,), ((4, 2),)
    if options.launches:
        # It runs what is here.
        from benchmarks.gpu import launches

        return launches.report(kinds=options.kinds)
    rates = [f"{name} at {rate:g} GB/s" for rate in options.memory_gbyte_s for name in ("forward", "backward")]
    rows = Rows("traffic", COLUMNS, ("grid", "forward MiB", "backward MiB", *rates), options)
    for setting in settings(options.cp_size, options.tokens, options.heads):
        rows.measure(setting.names, partial(measure, setting, options))
    return rows.close()


if __name__ == "__main__":
    sys.exit(main())
