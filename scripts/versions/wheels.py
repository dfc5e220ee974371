"""Wheels of megatron-core, each unpacked in a folder of its own beside the environment."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from megatron_wallfacer.megatron.releases import RELEASES

#: The newest version of each release that PyPI has a wheel of.
WHEELS = tuple(one.tested for one in RELEASES if one.wheel)


def unpack(release: str, cache: Path) -> Path:
    """The folder to put first on ``sys.path`` for a release; downloaded once.

    Its dependencies, PyTorch among them, stay those of the environment. Releases up to 0.15 ask for numpy < 2; what
    the plugin runs of them works with numpy 2.

    Raises:
        RuntimeError: pip failed; with what it said.
    """
    folder = cache / release
    if (folder / "megatron" / "core" / "package_info.py").is_file():
        return folder
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder)]
    done = subprocess.run([*command, f"megatron-core=={release}"], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"pip cannot install megatron-core=={release}: {done.stderr.strip()}")
    return folder
