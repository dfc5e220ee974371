"""The call path of a pass, counted: ``python -m benchmarks.calls``.

Functions and files of the package that a warm pass runs, and its Python calls, forward and backward: P 8, team-ring,
TransformerEngine's adapter on a stand-in for the library, messages on torch's fake process group. Row operations are
PyTorch's; with ``--launches`` they are launches of Triton kernels, as on a GPU. A Python call is what
``sys.setprofile`` reports of the package's files: a function, a lambda, each step of a generator. Comprehensions are
not calls since CPython 3.12; methods that ``dataclass`` generates have no file and are not counted.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any

import torch

import megatron_wallfacer
from benchmarks.gpu.tables import markdown
from benchmarks.host.fake_triton import fake_device
from benchmarks.host.passes import HEAD_DIM, HEADS, PASSES, Passes
from benchmarks.host.world import fake_world
from benchmarks.ours import Ours
from megatron_wallfacer.kernels.te import TransformerEngineKernel
from megatron_wallfacer.schedule.formulas import busiest_rank
from megatron_wallfacer.schedule.ops import Attend
from megatron_wallfacer.schedule.schemes import make_plan
from megatron_wallfacer.schedule.volume import Shape
from tests.kernels import fakes
from tests.kernels.releases import TE

PACKAGE = Path(megatron_wallfacer.__file__).parent
CP_SIZE, SCHEME, RELEASE = 8, "team-ring", "transformer-engine 2.20.2"
#: At most so many functions in so many files, and calls: of a pass, of each tile, of each other step of the schedule.
FUNCTIONS, FILES, CALLS = 30, 10, (60, 8, 4)

Function = tuple[str, str, int]
"""File below the package, qualified name, first line."""


@dataclass(frozen=True)
class CallPath:
    """One warm pass.

    Attributes:
        calls: Python calls by function, in the order in which each is first called.
        tiles: calls of the attention library.
        steps: steps of the schedule that are not attention.
    """

    calls: Counter[Function]
    tiles: int
    steps: int

    @property
    def files(self) -> list[str]:
        """Files in the order in which the pass reaches them."""
        return list(dict.fromkeys(file for file, _, _ in self.calls))

    @property
    def allowed(self) -> int:
        """Python calls that the pass may take."""
        fixed, tile, step = CALLS
        return fixed + tile * self.tiles + step * self.steps

    @property
    def within(self) -> bool:
        """Whether functions, files and calls are within the limits."""
        return len(self.calls) <= FUNCTIONS and len(self.files) <= FILES and self.calls.total() <= self.allowed


class StandIn:
    """TransformerEngine with a release's parameters and results of the right shapes; nothing is computed.

    Attributes:
        library: for :class:`TransformerEngineKernel`.
        calls: so far.
    """

    def __init__(self) -> None:
        self.calls = 0
        forward, backward = (fakes.definition(source) for source in TE[RELEASE])
        self.library = SimpleNamespace(
            FusedAttnBackend={"F16_arbitrary_seqlen": "cudnn"},
            TORCH_DType={"bf16": torch.bfloat16},
            fused_attn_fwd=fakes.function(forward, self._forward),
            fused_attn_bwd=fakes.function(backward, self._backward),
        )

    def _forward(self, given: dict[str, Any]) -> dict[str, Any]:
        self.calls += 1
        q, v = given["q"], given["v"]
        rows, batch, heads, _ = q.shape
        statistics = torch.zeros(batch, heads, rows, 1)
        return {"output_tensors[0]": q.new_zeros((*q.shape[:3], v.shape[3])), "output_tensors[1:]": [statistics, None]}

    def _backward(self, given: dict[str, Any]) -> dict[str, Any]:
        self.calls += 1
        return {"output_tensors": [*(torch.zeros_like(given[name]) for name in "qkv"), None, None]}


def count(*, launches: bool = False) -> tuple[CallPath, CallPath]:
    """Forward and backward of the busiest rank; row operations as PyTorch's, or as launches of Triton kernels."""
    plan, stand_in = make_plan(SCHEME, CP_SIZE, q_heads=HEADS[0], kv_heads=HEADS[1]), StandIn()
    rank = busiest_rank(plan)
    with fake_world(rank, CP_SIZE), fake_device(lambda *_: None) if launches else nullcontext():
        ours = Ours(SCHEME, CP_SIZE, HEADS, {"scheme": SCHEME})
        ours.prepare()
        kernel = TransformerEngineKernel(stand_in.library, title=RELEASE)
        passes, found = Passes(ours.bind(kernel, HEAD_DIM), (2, 1)), []
        passes.forward()
        passes.backward()
        schedules = ours.schedules(rank, Shape(tokens=2, q_heads=HEADS[0], kv_heads=HEADS[1], head_dim=HEAD_DIM))
        for run, schedule in zip((passes.forward, passes.backward), schedules, strict=True):
            stand_in.calls = 0
            calls = profiled(run)
            found.append(CallPath(calls, stand_in.calls, sum(not isinstance(op, Attend) for op in schedule.ops)))
    return found[0], found[1]


def profiled(run: Callable[[], object], package: Path = PACKAGE) -> Counter[Function]:
    """Python calls of a package's functions while something runs."""
    calls: Counter[Function] = Counter()
    prefix = f"{package}/"

    def note(frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(prefix):
            calls[code.co_filename.removeprefix(prefix), code.co_qualname, code.co_firstlineno] += 1

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        run()
    finally:
        sys.setprofile(before)
    return calls


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0; 1 with ``--check`` above a limit."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.calls", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--list", action="store_true", help="print the functions too, in the order of their first call")
    parser.add_argument("--launches", action="store_true", help="row operations as launches of Triton kernels")
    parser.add_argument("--check", action="store_true", help="exit with 1 above a limit")
    options = parser.parse_args(argv)
    both = count(launches=options.launches)
    heading = ("pass", f"functions (<= {FUNCTIONS})", f"files (<= {FILES})", "calls", "allowed", "tiles", "other steps")
    lines = [
        (name, *map(str, (len(one.calls), len(one.files), one.calls.total(), one.allowed, one.tiles, one.steps)))
        for name, one in zip(PASSES, both, strict=True)
    ]
    print(markdown(heading, lines))
    if options.list:
        for name, one in zip(PASSES, both, strict=True):
            print(f"\n{name}")
            for (file, function, line), calls in one.calls.items():
                print(f"{calls:6} {file}:{line} {function}")
    return int(options.check and not all(one.within for one in both))


if __name__ == "__main__":
    sys.exit(main())
