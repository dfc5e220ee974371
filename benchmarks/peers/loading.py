"""Importing the peers from where they were installed."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import distributions
from pathlib import Path
from types import ModuleType
from typing import Any

from megatron_wallfacer.errors import WallfacerError

HERE = Path(__file__).resolve().parent
INSTALLED = HERE.parent / ".peers"
INSTALL = f"{sys.executable} -m pip install --no-deps --target benchmarks/.peers -r benchmarks/peers/requirements.txt"


class PeerMissing(WallfacerError):
    """A peer is not installed, or cannot be imported."""


def load(name: str) -> ModuleType:
    """The top module of a peer.

    Raises:
        PeerMissing: with the command that installs it, or why it cannot be imported.
    """
    for path in (INSTALLED, HERE / "shim"):
        if str(path) not in sys.path:
            sys.path.append(str(path))
    if importlib.util.find_spec(name) is None:
        raise PeerMissing(f"{name} is not installed: {INSTALL}")
    try:
        with _without_transformers():
            return importlib.import_module(name)
    except ImportError as error:
        raise PeerMissing(f"{name} cannot be imported: {error}") from None


def use_kernel(kernel: Any) -> None:
    """Have the peers compute with a kernel; where FlashAttention itself is installed they compute with that."""
    interface = importlib.import_module("flash_attn.flash_attn_interface")
    if hasattr(interface, "use_kernel"):
        interface.use_kernel(kernel)


def versions() -> dict[str, str]:
    """Of the peers that are installed."""
    found = distributions(path=[str(INSTALLED)])
    return {distribution.metadata["Name"]: distribution.version for distribution in found}


@contextmanager
def _without_transformers() -> Iterator[None]:
    """Hide Hugging Face transformers behind an empty stand-in during an import.

    ring-flash-attn imports its adapter for it on the way, which fails with transformers 5 (the name
    ``is_flash_attn_greater_or_equal_2_10`` is gone), and is not used here.
    """
    names = ("transformers", "transformers.modeling_flash_attention_utils")
    before = {name: sys.modules.get(name) for name in names}
    for name in names:
        sys.modules[name] = ModuleType(name)
    sys.modules[names[0]].modeling_flash_attention_utils = sys.modules[names[1]]
    sys.modules[names[1]].is_flash_attn_greater_or_equal_2_10 = None
    try:
        yield
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module
