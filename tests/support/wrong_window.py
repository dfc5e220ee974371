"""Trains like scripts/pretrain_gpt.py, but with windows of one key too many."""

import runpy
from dataclasses import replace
from pathlib import Path

from megatron_wallfacer.megatron import core_attention

right = core_attention.layer_mask


def layer_mask(*args: object) -> object:
    mask = right(*args)
    return mask if mask.left is None else replace(mask, left=mask.left + 1)


core_attention.layer_mask = layer_mask
runpy.run_path(str(Path(__file__).resolve().parents[2] / "scripts" / "pretrain_gpt.py"), run_name="__main__")
