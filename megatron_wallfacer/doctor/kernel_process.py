"""Call kernels in a process of their own, because a kernel library may raise an error, crash or hang.

    python -m megatron_wallfacer.doctor.kernel_process NAME...

This command calls each kernel forward and backward on a small causal tile, and compares the results with the reference
kernel in fp64. The process prints one line of JSON at the start of each stage, and one line of JSON for each result.
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
from megatron_wallfacer.doctor.kernel_result import DEADLINE_S, HEAD_DIM, KernelResult
from megatron_wallfacer.errors import WallfacerError

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_wallfacer.kernels import Kernel

#: Rows and columns of the tile, query heads, kv heads.
TOKENS, Q_HEADS, KV_HEADS = 256, 4, 2
DTYPE = torch.bfloat16
#: Largest number of characters of an error text, because a compiler's error can have pages.
MAX_ERROR_LENGTH = 400


def main(names: Sequence[str], deadline_s: int = DEADLINE_S) -> None:
    """Call kernels one after the other. After an exception on a GPU the process ends, because CUDA errors persist."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    report = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    for name in names:
        result = _result(name, device, report, deadline_s)
        print(json.dumps(asdict(result)), file=report)
        if result.failure and device.type == "cuda":
            return


def _result(name: str, device: torch.device, report: TextIO, deadline_s: int) -> KernelResult:
    stage = ""

    def begin(text: str) -> None:
        nonlocal stage
        # The alarm ends the process even if the process hangs outside Python or its parent has ended.
        signal.alarm(deadline_s)
        stage = text
        line = {"kernel": name, "stage": text, "deadline_s": deadline_s, "cudnn": _cudnn_folders()}
        print(json.dumps(line), file=report)

    try:
        fields = _call(name, device, begin)
    except Exception as error:
        text = textwrap.shorten(str(error), MAX_ERROR_LENGTH, placeholder=" ...")
        kind = "" if isinstance(error, WallfacerError) else f"{type(error).__name__}: "
        fields = {"failure": f"{stage}: {kind}{text}"}
    signal.alarm(0)
    return KernelResult(name, **fields, cudnn=_cudnn_folders())


def _call(name: str, device: torch.device, begin: Callable[[str], None]) -> dict[str, object]:
    """Return fields of :class:`KernelResult`. ``auto`` only selects a kernel and does not call it."""
    from megatron_wallfacer.kernels import candidates, select_kernel
    from megatron_wallfacer.kernels.protocol import Inputs

    inputs = {"device": device, "dtype": DTYPE, "head_dim": HEAD_DIM}
    if name == "auto":
        begin("selection")
        return {"selected": select_kernel(name, **inputs).name}
    begin("import")
    ((_, reason),) = candidates(name, Inputs(**inputs, v_head_dim=HEAD_DIM))
    if reason is not None:
        return {"unavailable": reason}
    kernel = select_kernel(name, **inputs)
    return {"selected": kernel.name, "errors": relative_errors(kernel, device, begin)}


def relative_errors(kernel: Kernel, device: torch.device, begin: Callable[[str], None]) -> dict[str, float]:
    """Call a kernel on a causal tile, and return the relative errors of its results: out, lse, dq, dk and dv.

    The function ``begin`` is called with the name of each stage.
    """
    from megatron_wallfacer.kernels.reference import ReferenceKernel

    generator = torch.Generator().manual_seed(0)
    tile = [
        torch.randn(TOKENS, 1, heads, HEAD_DIM, generator=generator).to(DTYPE)
        for heads in (Q_HEADS, KV_HEADS, KV_HEADS, Q_HEADS)
    ]
    results = _both_passes(kernel, [x.to(device) for x in tile], begin)
    references = _both_passes(ReferenceKernel(), [x.double() for x in tile], begin=lambda _: None)
    rows = zip(("out", "lse", "dq", "dk", "dv"), results, references, strict=True)
    return {name: ((result.double() - exact).norm() / exact.norm()).item() for name, result, exact in rows}


def _both_passes(kernel: Kernel, tile: Sequence[Tensor], begin: Callable[[str], None]) -> list[Tensor]:
    """Return out, lse, dq, dk and dv on the CPU. Copying to the CPU waits for the GPU and raises the GPU's errors."""
    from megatron_wallfacer.kernels.protocol import AttnSpec
    from megatron_wallfacer.schedule.attn_tile import AttnTile

    q, k, v, dout = tile
    call = AttnTile((0, TOKENS), (0, TOKENS), causal=True), AttnSpec(HEAD_DIM**-0.5)
    begin("forward")
    out, lse = kernel.forward(q, k, v, *call)
    results = [out.cpu(), lse.cpu()]
    begin("backward")
    # Use a larger lse than that of the tile, because lse includes the keys of other tiles in a ring.
    return results + [x.cpu() for x in kernel.backward(dout, q, k, v, out, lse + math.log(2), *call)]


def _cudnn_folders() -> tuple[str, ...]:
    maps = Path("/proc/self/maps")
    return folders_in_maps(maps.read_text()) if maps.exists() else ()


if __name__ == "__main__":
    main(sys.argv[1:])
