"""Trains like scripts/pretrain_gpt.py on a machine that has 1,000 bytes of host memory left."""

import runpy
from pathlib import Path

from megatron_wallfacer.megatron.host_memory import prepare
from megatron_wallfacer.offload.host import Left

prepare.memory_left = lambda: Left(1000, "MemAvailable of /proc/meminfo")
runpy.run_path(str(Path(__file__).resolve().parents[2] / "scripts" / "pretrain_gpt.py"), run_name="__main__")
