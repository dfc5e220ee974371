"""The compiled part of TransformerEngine, in its place."""

from __future__ import annotations

from typing import Any

from transformer_engine import reject_cpu


def thd_get_partitioned_indices(*args: Any) -> None:
    """Reject tensors of the host."""
    reject_cpu(args)
