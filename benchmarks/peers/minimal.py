"""What is wrong with the peers on gloo, in the smallest case: ``python -m benchmarks.peers.minimal``.

Two processes on the loopback interface, no namespaces, no root. Prints relative errors against dense attention.
"""

from __future__ import annotations

import multiprocessing as mp
import sys
import tempfile
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import torch.distributed as dist

from benchmarks.contender import Contender
from benchmarks.dense import NAMES, Problem, make_problem, relative_error
from benchmarks.peers.loading import PeerMissing, load
from benchmarks.peers.ring_flash import RingFlashAttention
from benchmarks.peers.usp import Usp
from megatron_wallfacer.kernels.torch_cpu import TorchCpuKernel

_RANKS = 2
_CASES: tuple[tuple[type[Contender], tuple[int, ...], str], ...] = (
    (RingFlashAttention, (), "float64"),
    (RingFlashAttention, (), "float32"),
    (RingFlashAttention, (), "bfloat16"),
    (Usp, (1, 2), "float64"),
    (Usp, (1, 2), "float32"),
    (Usp, (2, 1), "float64"),
)

EXPLANATION = """
float32: zigzag_ring_flash_attn_backward sums in `dq = dq_buffer.to(torch.float32)` (and dk, dv). For an fp32 buffer
`.to` returns the buffer itself, and the next ring step overwrites it. bf16 and fp64 inputs are converted, which copies.
usp with a ring of one: the same function sends dk and dv on after every step, also after the only one, to its own
rank.
NCCL allows a rank to send to itself; gloo has no connection of a rank with itself."""


def main() -> int:
    """Run every case on fresh processes; 2 if a peer is not installed."""
    torch.set_num_threads(1)
    try:
        for package in ("ring_flash_attn", "yunchang"):
            load(package)
    except PeerMissing as error:
        print(f"benchmarks: error: {error}", file=sys.stderr)
        return 2
    problem = make_problem(64, 4, 4, 16)
    for make, arguments, dtype in _CASES:
        grid = f" (heads {arguments[0]}, ring {arguments[1]})" if arguments else ""
        print(f"{make(*arguments).label}{grid} {dtype}: {_run(make, arguments, dtype, problem)}", flush=True)
    print(EXPLANATION)
    return 0


def _run(make: type[Contender], arguments: tuple[int, ...], dtype: str, problem: Problem) -> str:
    context, pipes, processes = mp.get_context("fork"), [], []
    with tempfile.TemporaryDirectory() as folder:
        for rank in range(_RANKS):
            ours, theirs = context.Pipe(duplex=False)
            arguments_ = (rank, str(Path(folder) / "store"), make, arguments, dtype, problem, theirs)
            processes.append(context.Process(target=_rank, args=arguments_, daemon=True))
            processes[-1].start()
            pipes.append(ours)
        said = [pipe.recv() for pipe in pipes]
        for process in processes:
            process.kill()
            process.join()
    errors = [one for one in said if isinstance(one, str)]
    worst = {name: max(one[name] for one in said) for name in NAMES} if not errors else {}
    return errors[0] if errors else ", ".join(f"{name} {error:.1e}" for name, error in worst.items())


def _rank(
    rank: int,
    store: str,
    make: type[Contender],
    arguments: tuple[int, ...],
    dtype: str,
    problem: Problem,
    pipe: Connection,
) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=_RANKS)
    try:
        pipe.send(_errors(make(*arguments), dtype, problem))
    except Exception as error:
        pipe.send(f"{type(error).__name__}: {str(error).splitlines()[0]}")


def _errors(contender: Contender, dtype: str, problem: Problem) -> dict[str, float]:
    contender.prepare()
    local = {name: contender.shard(x).to(getattr(torch, dtype)) for name, x in problem.inputs.items()}
    q, k, v = (local[name].requires_grad_() for name in "qkv")
    out = contender.attend(q, k, v, TorchCpuKernel())
    out.backward(local["dout"])
    got = dict(zip(NAMES, (out.detach(), q.grad, k.grad, v.grad), strict=True))
    return {name: relative_error(got[name], contender.shard(problem.answers[name])) for name in NAMES}


if __name__ == "__main__":
    sys.exit(main())
