"""Trains like scripts/pretrain_gpt.py on a disk that fails after the first step.

FAILS names what: ``timeline``, whose folder is taken away, or ``checkpoint``, which cannot be written.
"""

from __future__ import annotations

import errno
import os
import runpy
import shutil
import sys
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook


def is_full(*_: Any, **__: Any) -> NoReturn:
    """What a write to a full disk raises."""
    raise OSError(errno.ENOSPC, "No space left on device")


def fail(*_: Any) -> None:
    """Called after each step of the optimizer; the second time nothing is left to do."""
    if os.environ["FAILS"] == "checkpoint":
        torch.save = is_full
        return
    folder = Path(sys.argv[sys.argv.index("--wallfacer-timeline") + 1])
    if folder.is_dir():
        shutil.rmtree(folder, ignore_errors=True)
        folder.touch()


register_optimizer_step_post_hook(fail)
runpy.run_path(str(Path(__file__).resolve().parents[2] / "scripts" / "pretrain_gpt.py"), run_name="__main__")
