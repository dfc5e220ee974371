"""On a machine with a GPU: every scheme on four ranks, over NCCL where the GPUs or the loaded NCCL allow it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_wallfacer.presets.shared_gpus import gpus_of_node, share_gpus
from megatron_wallfacer.schedule.schemes import SCHEMES

RANKS = 4


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_every_scheme_is_exact_on_ranks_that_share_a_card() -> None:
    gpus = gpus_of_node(os.environ)
    assert gpus.count == torch.cuda.device_count()
    sharing = share_gpus(gpus, RANKS, ())
    print(sharing.line)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS)]
    command += ["-m", "benchmarks.gpu.exact", "--smoke", *(("--backend", "gloo") if sharing.flags else ())]
    root = Path(__file__).parents[3]
    environment = os.environ | sharing.environment | {"PYTHONPATH": str(root)}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(scheme in done.stdout for scheme in SCHEMES)
    assert "destroy_process_group() was not called" not in done.stderr
