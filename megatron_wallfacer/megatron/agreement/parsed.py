"""Megatron's parsed arguments as texts that ranks can compare."""

from __future__ import annotations

import argparse
import hashlib
import json
import re
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Any

import torch

#: Arguments that differ between ranks by nature.
_OF_A_RANK = frozenset(
    (
        "rank",
        "local_rank",
        "node_rank",
        "world_size",
        "inprocess_active_world_size",
        "device",
        "straggler_ctrlr_port",
        "inference_coordinator_port",
    )
)
#: Arguments that name files or folders, also where the text has no slash.
_PATHS = re.compile(r"(_path|_paths|_dir|_folder|_file)$|^(save|load|wallfacer_timeline)$")
#: Files whose contents decide what is trained, or how ranks are connected.
_CONTENTS = ("wallfacer_cluster", "nccl_communicator_config_path")
_NUMBER = re.compile(r"[-+]?[0-9]*\.?[0-9]+(e[-+]?[0-9]+)?", re.IGNORECASE)
_PLAIN = (str, int, float, bool, type(None))


def settings_of(args: argparse.Namespace) -> tuple[dict[str, str | None], dict[str, str | None]]:
    """Return the arguments by flag: what must be equal, and paths, which may differ.

    In the first mapping a path is shown as ``PATH``, and a file that decides what is trained has its content's digest.

    Args:
        args: as parsed, before anything was filled in.
    """
    settings: dict[str, str | None] = {}
    paths: dict[str, str | None] = {}
    for name, value in sorted(vars(args).items()):
        if name in _OF_A_RANK:
            continue
        flag = f"--{name.replace('_', '-')}"
        settings[flag] = _text(value, hide=bool(_PATHS.search(name)))
        if (shown := _text(value, hide=None)) != settings[flag]:
            paths[flag] = shown
    return settings | dict(_contents(args)), paths


def _contents(args: argparse.Namespace) -> Iterator[tuple[str, str | None]]:
    for name in _CONTENTS:
        value = getattr(args, name, None)
        if isinstance(value, str) and Path(value).is_file():
            digest = hashlib.sha256(Path(value).read_bytes()).hexdigest()[:12]
            yield f"--{name.replace('_', '-')} with a file of SHA-256", digest


def _text(value: Any, *, hide: bool | None) -> str | None:
    """A value as text; empty for a switch that is on, None for one that is off and for no value.

    Args:
        value: of an argument.
        hide: write ``PATH`` for every text, or only for texts with a slash; None to write all texts.
    """
    if value is None or value is False:
        return None
    if value is True:
        return ""
    plain = _plain(value, hide)
    if isinstance(plain, list) and all(isinstance(item, (str, int, float)) for item in plain):
        # As it is typed: several words, or one with commas.
        return ("," if isinstance(value, tuple) else " ").join(map(str, plain))
    return plain if isinstance(plain, str) else json.dumps(plain, sort_keys=True)


def _plain(value: Any, hide: bool | None) -> Any:
    if isinstance(value, (str, Path)):
        text = str(value)
        # Weights of data sets are among their paths.
        return "PATH" if (hide and not _NUMBER.fullmatch(text)) or (hide is False and "/" in text) else text
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, dict):
        return {str(key): _plain(item, hide) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, hide) for item in value]
    if isinstance(value, torch.dtype):
        return str(value)
    # A text of other objects may have an address in it, which differs between ranks.
    return type(value).__qualname__
