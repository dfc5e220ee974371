"""Several ranks on one GPU: every scheme by CUDA graphs against eager passes, bit by bit.

    torchrun --nproc-per-node 4 -m benchmarks.gpu.graph_schemes            4 ranks, one card, NCCL (2.30 or newer)
    torchrun --nproc-per-node 4 -m benchmarks.gpu.graph_schemes --smoke    anywhere: on a tape in place of a graph

``own``: the plugin's graphs (``--wallfacer-cuda-graphs``), one per pass for all tensors. ``inside``: both passes in a
capture of another owner, as Megatron's ``--cuda-graph-impl local`` makes them. ``eager ms`` and ``own ms`` are the
times of both passes, shortest of the repeats.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.gpu.captures import Captures, Counted, apart, captures_of
from benchmarks.gpu.exact import HEADS, ORDER
from benchmarks.gpu.ranks import Ranks, join_ranks, leave
from benchmarks.gpu.report import add_options, device_of, kernel_of
from benchmarks.gpu.rows import LeftOut, Rows
from megatron_wallfacer.engine.autograd import attend
from megatron_wallfacer.engine.call import Call, Runtime
from megatron_wallfacer.engine.foreign import ForeignCaptures
from megatron_wallfacer.engine.graphed import EAGER_PASSES, Graphs
from megatron_wallfacer.engine.groups import AxisGroups, connect
from megatron_wallfacer.schedule.plan import Plan
from megatron_wallfacer.schedule.schemes import make_plan

RUNS = EAGER_PASSES + 2


class Layer:
    """Attention of one rank, by one way to run its passes.

    Args:
        plan: of the scheme.
        groups: of the plan.
        graphs: makes what runs passes from the groups; None for eager passes.
        captures: how graphs are made here.
        options: kernel, tokens, head_dim, dtype, device.
    """

    def __init__(
        self,
        plan: Plan,
        groups: AxisGroups,
        graphs: Callable[[AxisGroups], Graphs | ForeignCaptures] | None,
        captures: Captures,
        options: argparse.Namespace,
    ) -> None:
        self._options, self._device = options, device_of(options)
        self._dtype = getattr(torch, options.dtype)
        transfers, kernel = captures.transfers(groups), kernel_of(options, self._device, self._dtype)
        transfers.graphs = graphs(groups) if graphs is not None else None
        self.runner = transfers.graphs
        self.call = Call(plan, Runtime(transfers, kernel, options.head_dim**-0.5, graphs=transfers.graphs))

    def inputs(self, seed: int) -> list[Tensor]:
        """q, k, v and dout of this rank, sbhd."""
        tokens = self._options.tokens // dist.get_world_size()
        generator = torch.Generator().manual_seed(100 * seed + dist.get_rank())
        heads = (HEADS[0], HEADS[1], HEADS[1], HEADS[0])
        shapes = [(tokens, 1, one, self._options.head_dim) for one in heads]
        return [torch.randn(shape, generator=generator).to(self._device, self._dtype) for shape in shapes]

    def passes(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """out, dq, dk, dv."""
        *qkv, dout = tensors
        leaves = [x.detach().requires_grad_() for x in qkv]
        out = attend(*leaves, self.call)
        return [out.detach(), *torch.autograd.grad(out, leaves, dout)]

    def milliseconds(self) -> float:
        """Shortest time of both passes."""
        tensors, times = self.inputs(0), []
        for _ in range(self._options.repeats):
            begin = time.perf_counter()
            self.passes(tensors)
            if self._device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - begin)
        return 1e3 * min(times)


def measure(scheme: str, options: argparse.Namespace, ranks: Ranks) -> Iterator[tuple[str, ...]]:
    """One scheme, all ways.

    Raises:
        OptionError: the scheme cannot be had for so many ranks and heads.
        LeftOut: messages go through host memory.
    """
    if ranks.transfers == "staged":
        raise LeftOut("a CUDA graph holds messages of NCCL only")
    captures = captures_of(device_of(options))
    plan = make_plan(scheme, ranks.size, q_heads=HEADS[0], kv_heads=HEADS[1])
    groups = connect(dist.group.WORLD, plan.grid, device=device_of(options))
    eager = Layer(plan, groups, None, captures, options)
    wanted = [eager.passes(eager.inputs(seed)) for seed in range(RUNS)]
    counted = Counted(captures.make())
    own = Layer(plan, groups, lambda groups: Graphs(groups, counted), captures, options)
    by_graph = [own.passes(own.inputs(seed)) for seed in range(RUNS)]
    replays = counted.replays
    inside = Layer(plan, groups, lambda _: ForeignCaptures(in_progress=captures.in_progress), captures, options)
    captured = _captured(inside, captures)
    worst = [
        max(ranks.all(max(apart(*pair) for pair in zip(found, wanted, strict=True)))) for found in (by_graph, captured)
    ]
    timed = [f"{max(ranks.all(layer.milliseconds())):.2f}" for layer in (eager, own)]
    own.runner.drop()
    groups.close()
    graphed = counted.graphs == 2 and replays == 2 * (RUNS - EAGER_PASSES)
    verdict = "ok" if worst == [0, 0] else "wrong"
    yield (
        str(plan.grid),
        *(f"{one:.1e}" for one in worst),
        *timed,
        verdict if graphed else f"wrong: {counted.graphs} graphs, {replays} replays",
    )


def _captured(layer: Layer, captures: Captures) -> list[list[Tensor]]:
    """Results of a graph that somebody else makes of both passes, after an eager run."""
    static, results = layer.inputs(RUNS), []
    layer.passes(static)
    graph = captures.make()(lambda: results.extend(layer.passes(static)))
    found = []
    for seed in range(RUNS):
        for x, other in zip(static, layer.inputs(seed), strict=True):
            x.copy_(other)
        graph.replay()
        found.append([x.clone() for x in results])
    graph.reset()
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print on rank 0, save; 1 if a replay differs or a pass has no graph."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add_options(parser)
    parser.add_argument("--tokens", type=int, default=8192, help="tokens of the whole sequence (default: 8192)")
    parser.add_argument("--backend", choices=("nccl", "gloo"), help="(default: nccl on a GPU, gloo on a CPU)")
    options = parser.parse_args(argv)
    if options.smoke:
        options.tokens, options.head_dim, options.repeats = 64, 32, 1
    captures_of(device_of(options))
    ranks = join_ranks(options)
    values = ("grid", "own, largest difference", "inside, largest difference", "eager ms", "own ms")
    rows = Rows(f"graph-schemes-{ranks.size}", ("scheme",), values, options, ranks=ranks)
    for scheme in ORDER:
        rows.measure((scheme,), partial(measure, scheme, options, ranks))
    code = rows.close()
    leave(ranks)
    return code


if __name__ == "__main__":
    sys.exit(main())
