"""The stand-in for FlashAttention, and what is said of the peers."""

import os
import re
import subprocess
import sys

import pytest

from benchmarks.peers.loading import HERE, INSTALL, INSTALLED, PeerMissing, load
from tests.benchmarks.support import REPOSITORY

# In a process of its own: nobody else here should find a package called flash_attn.
SHIM = """
import torch
from flash_attn.flash_attn_interface import _flash_attn_backward, _flash_attn_forward, use_kernel
from benchmarks.dense import make_problem, relative_error
from megatron_wallfacer.kernels.torch_cpu import TorchCpuKernel

problem = make_problem(32, 4, 2, 8)
q, k, v, dout = (problem.inputs[name] for name in ("q", "k", "v", "dout"))
use_kernel(TorchCpuKernel())
out, lse, _, _ = _flash_attn_forward(q, k, v, 0.0, 8**-0.5, True, -1, -1, 0.0, None, False)
assert lse.shape == (1, 4, 32)
found = {"out": out, "dq": torch.empty_like(q), "dk": torch.empty_like(k), "dv": torch.empty_like(v)}
grads = found["dq"], found["dk"], found["dv"]
_flash_attn_backward(dout, q, k, v, out, lse, *grads, 0.0, 8**-0.5, True, -1, -1, 0.0, None, False)
assert all(relative_error(found[name], problem.answers[name]) < 1e-12 for name in found)
try:
    _flash_attn_forward(q, k, v, 0.1, 1.0, True, -1, -1, 0.0, None, False)
except NotImplementedError:
    print("exact")
"""


def python(*arguments):
    environment = {**os.environ, "PYTHONPATH": f"{REPOSITORY}{os.pathsep}{HERE / 'shim'}", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False
    )


def test_the_stand_in_computes_attention_and_rejects_what_it_does_not_know():
    done = python("-c", SHIM)
    assert done.stdout == "exact\n", done.stderr


def test_a_peer_that_is_not_installed_comes_with_the_command_that_installs_it():
    with pytest.raises(PeerMissing, match=re.escape(INSTALL)):
        load("a_peer_that_nobody_wrote")


@pytest.mark.skipif(not INSTALLED.is_dir(), reason=f"the peers are not installed: {INSTALL}")
def test_the_peers_are_as_wrong_on_gloo_as_the_documentation_says():
    done = python("-m", "benchmarks.peers.minimal")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    worst = {
        line.split(":")[0]: max(float(error) for error in re.findall(r"[\d.]+e[+-]\d+", line))
        for line in lines
        if ": out " in line
    }
    assert worst["rfa-zigzag float64"] < 1e-6
    assert worst["rfa-zigzag bfloat16"] < 5e-2
    assert worst["rfa-zigzag float32"] > 0.1
    assert any(line.startswith("usp-2") and "not connected" in line for line in lines)
