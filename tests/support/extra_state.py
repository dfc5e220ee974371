"""Trains like scripts/pretrain_gpt.py, with a core attention that keeps an `_extra_state` as TransformerEngine's does.

EXTRA_STATE=saved: it is in sharded checkpoints too, as up to Megatron 0.14; else only in a plain state dict.
"""

import os
import runpy
from pathlib import Path
from typing import Any

import torch
from megatron.core.models import backends
from megatron.core.transformer.dot_product_attention import DotProductAttention


class Stateful(DotProductAttention):
    """Megatron's own, with a state that means nothing to others."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_load_state_dict_post_hook(_may_be_missing)

    def get_extra_state(self) -> torch.Tensor:
        return torch.zeros(4, dtype=torch.uint8)

    def set_extra_state(self, state: torch.Tensor) -> None:
        assert state is None or state.shape == (4,)

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        if os.environ.get("EXTRA_STATE") != "saved":
            return {}
        # That of any module, which includes the extra state.
        return super(DotProductAttention, self).sharded_state_dict(*args, **kwargs)


def _may_be_missing(module: torch.nn.Module, keys: Any) -> None:
    keys.missing_keys[:] = [key for key in keys.missing_keys if "_extra_state" not in key]


backends.LocalSpecProvider.core_attention = lambda _: Stateful
runpy.run_path(str(Path(__file__).resolve().parents[2] / "scripts" / "pretrain_gpt.py"), run_name="__main__")
