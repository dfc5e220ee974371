"""The store of a job that a test starts, as torchrun's agent has one: its port is held from the first moment on.

A port that is probed, closed and bound later by rank 0 may be another process's by then (EADDRINUSE).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

HOST = "127.0.0.1"


@contextmanager
def job_store() -> Iterator[dict[str, str]]:
    """Serve a store on a port that the kernel chooses; yield the variables by which ranks find it."""
    from torch.distributed import TCPStore

    store = TCPStore(HOST, 0, is_master=True, wait_for_workers=False)
    yield variables(store.port)
    del store


def variables(port: int) -> dict[str, str]:
    """Return what torchrun would set: ranks are clients of a store that another process serves."""
    return {
        "MASTER_ADDR": HOST,
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
    }
