"""The process that calls kernels: a library may raise, crash or hang, and then only this process is lost.

    python -m megatron_wallfacer.doctor.kernel_process NAME...

calls each kernel forward and backward on a small causal tile, and compares with the reference kernel in fp64. It prints
one line of JSON for each stage that begins, and for each answer.
"""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import torch

from megatron_wallfacer.doctor.cudnn import folders_in_maps
from megatron_wallfacer.doctor.kernel_result import DEADLINE_S, HEAD_DIM, Answer
from megatron_wallfacer.errors import WallfacerError

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_wallfacer.kernels import Kernel

#: Tile: rows and columns, query heads, kv heads.
TOKENS, Q_HEADS, KV_HEADS = 256, 4, 2
DTYPE = torch.bfloat16
#: Characters of an error that are shown: a compiler's has pages.
LONGEST = 400


def main(names: Sequence[str], deadline_s: int = DEADLINE_S) -> None:
    """Call kernels in turn; end early after one that raised on a GPU, whose errors stay with the process.

    Args:
        names: of kernels.
        deadline_s: for one stage of one kernel.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    report = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    for name in names:
        answer = _answer(name, device, report, deadline_s)
        print(json.dumps(asdict(answer)), file=report)
        if answer.failed and device.type == "cuda":
            return


def _answer(name: str, device: torch.device, report: TextIO, deadline_s: int) -> Answer:
    stage = ""

    def begin(text: str) -> None:
        nonlocal stage
        # Ends the process, also where it hangs outside Python, and where its parent has died.
        signal.alarm(deadline_s)
        stage = text
        told = {"kernel": name, "stage": text, "deadline_s": deadline_s, "cudnn": _cudnn()}
        print(json.dumps(told), file=report)

    try:
        found = _choose(name, device, begin) if name == "auto" else _call(name, device, begin)
    except Exception as error:
        text = textwrap.shorten(str(error), LONGEST, placeholder=" ...")
        kind = "" if isinstance(error, WallfacerError) else f"{type(error).__name__}: "
        found = {"failed": f"{stage}: {kind}{text}"}
    signal.alarm(0)
    return Answer(name, **found, cudnn=_cudnn())


def _choose(name: str, device: torch.device, begin: Callable[[str], None]) -> dict[str, object]:
    from megatron_wallfacer.kernels import select_kernel

    begin("choice")
    return {"chosen": select_kernel(name, device=device, dtype=DTYPE, head_dim=HEAD_DIM).name}


def _call(name: str, device: torch.device, begin: Callable[[str], None]) -> dict[str, object]:
    from megatron_wallfacer.kernels import candidates, select_kernel

    inputs = {"device": device, "dtype": DTYPE, "head_dim": HEAD_DIM}
    begin("import")
    ((_, reason),) = candidates(name, **inputs)
    if reason is not None:
        return {"absent": reason}
    kernel = select_kernel(name, **inputs)
    return {"chosen": kernel.name, "errors": errors_of(kernel, device, begin)}


def errors_of(kernel: Kernel, device: torch.device, begin: Callable[[str], None]) -> dict[str, float]:
    """Return the relative errors of one causal tile, by tensor.

    Args:
        kernel: called forward and backward.
        device: where it is called.
        begin: called with the name of each stage.
    """
    from megatron_wallfacer.kernels.reference import ReferenceKernel

    generator = torch.Generator().manual_seed(0)
    tile = [
        torch.randn(TOKENS, 1, heads, HEAD_DIM, generator=generator).to(DTYPE)
        for heads in (Q_HEADS, KV_HEADS, KV_HEADS, Q_HEADS)
    ]
    found = _passes(kernel, [x.to(device) for x in tile], begin)
    wanted = _passes(ReferenceKernel(), [x.double() for x in tile], begin=lambda _: None)
    pairs = zip(("out", "lse", "dq", "dk", "dv"), found, wanted, strict=True)
    return {name: ((got.double() - want).norm() / want.norm()).item() for name, got, want in pairs}


def _passes(kernel: Kernel, tile: Sequence[Tensor], begin: Callable[[str], None]) -> list[Tensor]:
    """out, lse, dq, dk and dv on the CPU: copying waits for the GPU, and shows its errors."""
    from megatron_wallfacer.kernels.protocol import AttnSpec
    from megatron_wallfacer.schedule.attn_tile import AttnTile

    q, k, v, dout = tile
    call = AttnTile((0, TOKENS), (0, TOKENS), causal=True), AttnSpec(HEAD_DIM**-0.5)
    begin("forward")
    out, lse = kernel.forward(q, k, v, *call)
    found = [out.cpu(), lse.cpu()]
    begin("backward")
    # As in a ring: the log-sum-exp is of more keys than the tile's.
    return found + [x.cpu() for x in kernel.backward(dout, q, k, v, out, lse + math.log(2), *call)]


def _cudnn() -> tuple[str, ...]:
    maps = Path("/proc/self/maps")
    return folders_in_maps(maps.read_text()) if maps.exists() else ()


if __name__ == "__main__":
    main(sys.argv[1:])
