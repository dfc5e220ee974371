"""Megatron, the places where the plugin hooks in, and the grid that ``auto`` would choose."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

from megatron_wallfacer.doctor.finding import Finding, examined

if TYPE_CHECKING:
    import torch

    from megatron_wallfacer.megatron.hook import Hook
    from megatron_wallfacer.megatron.version import Version

#: What `auto` chooses for: heads of an 8B model, context-parallel sizes and tokens per rank.
Q_HEADS, KV_HEADS, SIZES, TOKENS = 32, 8, (8, 16, 64), 8192
_OTHER_MEGATRON = "use a Megatron that the plugin knows (docs/versions.md), or a newer megatron-wallfacer"


def megatron() -> Iterator[Finding]:
    """Which Megatron would be imported, and each hook."""
    from megatron_wallfacer.megatron.version import check_supported, megatron_version, version_text

    version = megatron_version()
    spec = importlib.util.find_spec("megatron.core")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    place = next(iter(spec.submodule_search_locations))
    text = f"megatron-core {version_text(version)}, {place}"

    def supported() -> Iterator[Finding]:
        check_supported(version)
        yield Finding("megatron", "ok", text)

    yield from examined("megatron", supported, _OTHER_MEGATRON)
    yield from examined(
        "hooks", partial(_hooks, version), "pip install 'megatron-core[training]', which brings what it needs"
    )


def schemes() -> Iterator[Finding]:
    """The grid that ``--wallfacer-scheme auto`` stands for."""
    from megatron_wallfacer.schedule.schemes import make_plan

    for size in SIZES:
        plan = make_plan("auto", size, q_heads=Q_HEADS, kv_heads=KV_HEADS, tokens=TOKENS)
        found = f"{plan.scheme}: {plan.grid}, for {Q_HEADS} query and {KV_HEADS} kv heads, {TOKENS:,} tokens per rank"
        yield Finding(f"scheme auto, cp size {size}", "ok", found)


def _device() -> torch.device:
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _hooks(version: Version) -> Iterator[Finding]:
    from megatron_wallfacer.megatron.hooks import Hooks
    from megatron_wallfacer.megatron.session import Session

    hooks = Hooks(Session(version, _device()))
    for hook in hooks.every:
        if hook not in (*hooks.always, *hooks.when_on) and not hook.fits(version):
            # Only what asks for it would miss it.
            remedy = "nothing: this Megatron has no use for it"
            yield Finding(f"hook {hook.name}", "note", f"not for this Megatron: {hook.target}", remedy)
        else:
            yield from examined(f"hook {hook.name}", partial(_hook, hook, version), _OTHER_MEGATRON)


def _hook(hook: Hook, version: Version) -> Iterator[Finding]:
    """By the hook's own rules; Megatron is not changed."""
    hook.find(version)
    asked = ", ".join(name for name in hook.parameters if name != "self")
    yield Finding(f"hook {hook.name}", "ok", hook.target + (f" with {asked}" if asked else ""))
