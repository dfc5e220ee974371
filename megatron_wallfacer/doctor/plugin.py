"""Check Megatron's version, the functions that the plugin replaces, and the choice of ``--wallfacer-scheme auto``."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

from megatron_wallfacer.doctor.finding import Finding, run_check

if TYPE_CHECKING:
    from megatron_wallfacer.megatron.hook import Hook
    from megatron_wallfacer.megatron.version import Version

#: Query heads and kv heads of an 8B model, context-parallel sizes, and tokens per rank.
Q_HEADS, KV_HEADS, SIZES, TOKENS = 32, 8, (8, 16, 64), 8192
_OTHER_MEGATRON = "use a supported Megatron release (docs/compatibility.md), or a newer megatron-wallfacer"


def megatron() -> Iterator[Finding]:
    """Check the version of the installed Megatron, and each hook."""
    from megatron_wallfacer.megatron.releases import version_text
    from megatron_wallfacer.megatron.version import check_supported, megatron_version

    version = megatron_version()
    spec = importlib.util.find_spec("megatron.core")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    place = next(iter(spec.submodule_search_locations))
    text = f"megatron-core {version_text(version)}, {place}"

    def supported() -> Iterator[Finding]:
        check_supported(version)
        yield Finding("megatron", "ok", text)

    yield from run_check("megatron", supported, _OTHER_MEGATRON)
    yield from run_check(
        "hooks", partial(_hooks, version), "pip install 'megatron-core[training]', with its dependencies"
    )


def schemes() -> Iterator[Finding]:
    """Report the grid of ``--wallfacer-scheme auto`` at several context-parallel sizes."""
    from megatron_wallfacer.schedule.schemes import make_plan

    for size in SIZES:
        plan = make_plan("auto", size, q_heads=Q_HEADS, kv_heads=KV_HEADS, tokens=TOKENS)
        text = f"{plan.scheme}: {plan.grid}, for {Q_HEADS} query and {KV_HEADS} kv heads, {TOKENS:,} tokens per rank"
        yield Finding(f"scheme auto, cp size {size}", "ok", text)


def _hooks(version: Version) -> Iterator[Finding]:
    import torch

    from megatron_wallfacer.megatron.hooks import Hooks
    from megatron_wallfacer.megatron.plugin_state import PluginState

    hooks = Hooks(PluginState(version, torch.device("cuda" if torch.cuda.is_available() else "cpu")))
    for hook in hooks.every:
        if hook not in hooks.core and not hook.fits(version):
            # A hook that is not core disables only its own feature.
            remedy = "none needed: this Megatron does not use it"
            yield Finding(f"hook {hook.name}", "note", f"not for this Megatron release: {hook.target}", remedy)
        else:
            yield from run_check(f"hook {hook.name}", partial(_hook, hook, version), _OTHER_MEGATRON)


def _hook(hook: Hook, version: Version) -> Iterator[Finding]:
    """Check one hook without installing it."""
    hook.find(version)
    parameters = ", ".join(name for name in hook.parameters if name != "self")
    yield Finding(f"hook {hook.name}", "ok", hook.target + (f" with {parameters}" if parameters else ""))
