"""Trains like scripts/pretrain_gpt.py, but with a mask that lets queries see keys after them."""

import runpy
from dataclasses import replace
from pathlib import Path

from megatron_wallfacer.schedule import head_group

right = head_group.tiles
head_group.tiles = lambda *args, **kwargs: tuple(replace(tile, causal=False) for tile in right(*args, **kwargs))
runpy.run_path(str(Path(__file__).resolve().parents[2] / "scripts" / "pretrain_gpt.py"), run_name="__main__")
