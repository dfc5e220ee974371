"""Compute rotary positions in packed documents: ``--dataloader-inter-document-masking``."""

from __future__ import annotations

from megatron_wallfacer.megatron.hook import Hook
from megatron_wallfacer.megatron.releases import ROTARY_LAYOUT
from megatron_wallfacer.megatron.rope import rotate_by_document


def rope_hook() -> Hook:
    """Return the hook of rotary positions for packed documents whose sequence is split as a whole."""
    return Hook(
        name="rope of packed sequences",
        purpose="computes rotary positions within documents if the whole sequence is split",
        target="megatron.core.models.common.embeddings.rope_utils:_apply_rotary_pos_emb_thd",
        since=ROTARY_LAYOUT,
        parameters=("t", "cu_seqlens", "freqs", "cp_group"),
        wrap=rotate_by_document,
    )
