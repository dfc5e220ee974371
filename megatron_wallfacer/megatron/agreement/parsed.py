"""Convert Megatron's parsed arguments to texts that ranks can compare."""

from __future__ import annotations

import argparse
import hashlib
import json
import re
from enum import Enum
from pathlib import Path
from typing import Any

import torch

from megatron_wallfacer.megatron.flags import FLAGS

#: Arguments that may differ between ranks.
_OF_A_RANK = {
    "rank",
    "local_rank",
    "node_rank",
    "world_size",
    "inprocess_active_world_size",
    "device",
    "straggler_ctrlr_port",
    "inference_coordinator_port",
}
#: Metavar of each flag of the plugin, by argument.
_METAVARS = {spec.dest: spec.argparse_meta.get("metavar") for spec in FLAGS}
#: Megatron's arguments that name files or folders, even if the text has no slash.
_PATHS = re.compile(r"(_path|_paths|_dir|_folder|_file)$|^(save|load)$")
#: Arguments whose files must have the same content on all ranks.
_CONTENTS = (*(name for name, kind in _METAVARS.items() if kind == "FILE"), "nccl_communicator_config_path")
_NUMBER = re.compile(r"[-+]?[0-9]*\.?[0-9]+(e[-+]?[0-9]+)?", re.IGNORECASE)


def settings_of(args: argparse.Namespace) -> tuple[dict[str, str | None], dict[str, str | None]]:
    """Return two dictionaries with flags as keys: arguments that must be equal on all ranks, and paths.

    In the arguments that must be equal, each path is replaced by ``PATH``. If the content of a file must be equal, they
    also have a digest of the file. Paths may differ between ranks.
    """
    settings: dict[str, str | None] = {}
    paths: dict[str, str | None] = {}
    for name, value in sorted(vars(args).items()):
        if name in _OF_A_RANK:
            continue
        flag = f"--{name.replace('_', '-')}"
        settings[flag] = _text(value, hide=_METAVARS.get(name) == "DIR" or bool(_PATHS.search(name)))
        if (shown := _text(value, hide=None)) != settings[flag]:
            paths[flag] = shown
    for name in _CONTENTS:
        value = getattr(args, name, None)
        if isinstance(value, str) and Path(value).is_file():
            digest = hashlib.sha256(Path(value).read_bytes()).hexdigest()[:12]
            settings[f"--{name.replace('_', '-')} with a file of SHA-256"] = digest
    return settings, paths


def _text(value: Any, *, hide: bool | None) -> str | None:
    """Return the value of an argument as text.

    True becomes an empty text. False and None become None.

    Args:
        value: parsed value of one of Megatron's arguments.
        hide: which strings are replaced by the word PATH. True replaces all strings except numbers. False replaces
            strings with a slash. None replaces no string.
    """
    if value is None or value is False:
        return None
    if value is True:
        return ""
    plain = _plain(value, hide)
    if isinstance(plain, list) and all(isinstance(item, (str, int, float)) for item in plain):
        # The form on the command line: several words, or one word with commas.
        return ("," if isinstance(value, tuple) else " ").join(map(str, plain))
    return plain if isinstance(plain, str) else json.dumps(plain, sort_keys=True)


def _plain(value: Any, hide: bool | None) -> Any:
    if isinstance(value, (str, Path)):
        text = str(value)
        # Keep numbers, because --data-path mixes paths with weights.
        return "PATH" if (hide and not _NUMBER.fullmatch(text)) or (hide is False and "/" in text) else text
    if isinstance(value, Enum):
        return value.name
    if value is None or isinstance(value, (int, float)):
        return value
    if isinstance(value, dict):
        return {str(key): _plain(item, hide) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, hide) for item in value]
    if isinstance(value, torch.dtype):
        return str(value)
    # The text of other objects may contain a memory address, which differs between ranks.
    return type(value).__qualname__
