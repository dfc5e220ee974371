"""Presets, clusters and the training script: beside the package in a checkout, in it once it is installed."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


def shipped(*parts: str) -> Path:
    """Where a file or folder of the repository lies; setup.py copies it into a wheel."""
    installed = _PACKAGE.joinpath(*parts)
    return installed if installed.exists() else _PACKAGE.parent.joinpath(*parts)


CONFIGS = shipped("configs")
SCRIPT = shipped("scripts", "pretrain_gpt.py")
