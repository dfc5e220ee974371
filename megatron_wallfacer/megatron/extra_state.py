"""What TransformerEngine's attention leaves in a plain checkpoint, and what is said of it."""

from __future__ import annotations

import os
from functools import cache


@cache
def say_extra_state_is_ignored() -> None:
    """One line on rank 0, once a run however many layers there are."""
    if os.environ.get("RANK", "0") == "0":
        print(
            "wallfacer: the checkpoint's core_attention._extra_state entries are TransformerEngine's; "
            "attention needs nothing of them, they are ignored",
            flush=True,
        )
