"""Find presets, clusters and the training script inside the installed package, or in a checkout."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


def shipped(*parts: str) -> Path:
    """Return the path of a file or folder of the repository, in a wheel or in a checkout."""
    installed = _PACKAGE.joinpath(*parts)
    return installed if installed.exists() else _PACKAGE.parent.joinpath(*parts)


CONFIGS = shipped("configs")
SCRIPT = shipped("scripts", "pretrain_gpt.py")
