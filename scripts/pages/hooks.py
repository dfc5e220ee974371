"""Rows of the table of hooks in docs/design.md."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from megatron_wallfacer.megatron.hooks.registry import Hooks
from megatron_wallfacer.megatron.plugin_state import PluginState
from megatron_wallfacer.megatron.releases import FIRST_LAUNCHED


def hook_rows() -> str:
    """Return a row per hook in Markdown: name, target, flag that installs it, what it does."""
    return "\n".join(_rows())


def _rows() -> Iterator[str]:
    for entry, made in Hooks(PluginState((*FIRST_LAUNCHED, 0), torch.device("cpu"))).entries:
        given = f"`{entry.given}`" if entry.given.startswith("--") else entry.given
        for hook in made:
            yield f"| {hook.name} | `{hook.target}` | {given} | {hook.purpose} |"
