"""The table of docs/kernels.md: one row per kernel of the registry."""

from __future__ import annotations

from megatron_wallfacer.kernels.protocol import Capabilities
from megatron_wallfacer.kernels.select import REGISTRY

_COLUMNS = (
    "name",
    "library",
    "releases whose sources are tested",
    "dtype",
    "head dims",
    "other head dim for values",
    "window",
    "softcap",
    "deterministic",
)


def kernel_rows() -> str:
    """Return the table of kernels, as Markdown."""
    rows = (
        (
            f"`{entry.name}`",
            entry.library,
            entry.releases,
            "fp64, fp32, bf16, fp16" if entry.capabilities.dtypes is None else "fp16, bf16",
            _head_dims(entry.capabilities),
            *(
                "yes" if supported else "no"
                for supported in (
                    entry.capabilities.v_head_dim,
                    entry.capabilities.window,
                    entry.capabilities.softcap,
                )
            ),
            entry.deterministic,
        )
        for entry in REGISTRY
    )
    return "\n".join(f"| {' | '.join(row)} |" for row in (_COLUMNS, ["---"] * len(_COLUMNS), *rows))


def _head_dims(capabilities: Capabilities) -> str:
    if capabilities.max_head_dim is None:
        return "any"
    return f"multiples of {capabilities.head_dim_multiple} to {capabilities.max_head_dim}"
