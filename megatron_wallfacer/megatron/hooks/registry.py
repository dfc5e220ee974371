"""All hooks in one table, and their installation in two steps: before and after the flags are parsed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from megatron_wallfacer.megatron.hook import Hook
from megatron_wallfacer.megatron.hooks.arguments import arguments_hook
from megatron_wallfacer.megatron.hooks.core_attention import core_attention_hooks
from megatron_wallfacer.megatron.hooks.generation import generation_hook
from megatron_wallfacer.megatron.hooks.groups import groups_hooks
from megatron_wallfacer.megatron.hooks.host_memory import layer_inputs_hook
from megatron_wallfacer.megatron.hooks.layers import layers_hook
from megatron_wallfacer.megatron.hooks.loss import loss_hook
from megatron_wallfacer.megatron.hooks.metrics import metrics_hook
from megatron_wallfacer.megatron.hooks.mtp import mtp_hooks
from megatron_wallfacer.megatron.hooks.rope import rope_hook
from megatron_wallfacer.megatron.hooks.start import start_hook
from megatron_wallfacer.megatron.hooks.token_tiles import loss_tiles_hook, mlp_tiles_hook
from megatron_wallfacer.megatron.packed import shards_whole_sequence
from megatron_wallfacer.megatron.plugin_state import PluginState

#: Of an entry: installed by :meth:`Hooks.install`, before flags are parsed.
ALWAYS = "always"


@dataclass(frozen=True)
class HookEntry:
    """Hooks that are installed together.

    Attributes:
        given: flag that they are installed with, or :data:`ALWAYS`.
        make: makes them.
        enabled_when: whether they are installed, given the state after parsing.
        core: whether attention cannot run without them; others need not fit every release.
    """

    given: str
    make: Callable[[Hooks], tuple[Hook, ...]]
    enabled_when: Callable[[PluginState], bool] = lambda state: True
    core: bool = False


_ON = "--wallfacer-cp-size"

#: In the order in which they are installed.
ENTRIES = (
    HookEntry(ALWAYS, lambda hooks: (arguments_hook(hooks.state, hooks.switch_on), start_hook(hooks.state)), core=True),
    HookEntry(_ON, lambda hooks: groups_hooks(hooks.state), core=True),
    HookEntry(_ON, lambda hooks: core_attention_hooks(hooks.state), core=True),
    HookEntry(_ON, lambda hooks: (layers_hook(hooks.state, hooks.verify),), core=True),
    HookEntry(_ON, lambda hooks: (loss_hook(hooks.state), *mtp_hooks(), generation_hook(hooks.state))),
    HookEntry(
        "--dataloader-inter-document-masking",
        lambda hooks: (rope_hook(),),
        lambda state: shards_whole_sequence(state.args),
    ),
    HookEntry(
        "--wallfacer-log-metrics",
        lambda hooks: (metrics_hook(hooks.state),),
        lambda state: state.settings.flags.log_metrics,
    ),
    HookEntry(
        "--wallfacer-loss-tiles",
        lambda hooks: (loss_tiles_hook(hooks.state),),
        lambda state: state.settings.flags.loss_tiles is not None,
    ),
    HookEntry(
        "--wallfacer-mlp-tiles",
        lambda hooks: (mlp_tiles_hook(hooks.state),),
        lambda state: state.settings.flags.mlp_tiles is not None,
    ),
    HookEntry(
        "--wallfacer-layer-inputs-on-host",
        lambda hooks: (layer_inputs_hook(hooks.state),),
        lambda state: state.settings.flags.layer_inputs_on_host is not None,
    ),
)


class Hooks:
    """The hooks of one process.

    Attributes:
        state: state of the plugin.
        entries: hooks of each entry of :data:`ENTRIES`.
    """

    def __init__(self, state: PluginState) -> None:
        self.state = state
        self.entries = tuple((entry, entry.make(self)) for entry in ENTRIES)

    @property
    def every(self) -> tuple[Hook, ...]:
        """All of them, installed or not."""
        return tuple(hook for _, made in self.entries for hook in made)

    @property
    def core(self) -> tuple[Hook, ...]:
        """Those that attention cannot run without."""
        return tuple(hook for entry, made in self.entries if entry.core for hook in made)

    def install(self) -> None:
        """Add the flags to Megatron's parser, and the comparison of ranks before its groups.

        Raises:
            WallfacerError: a target is missing or has changed.
        """
        self._apply(lambda entry: entry.given == ALWAYS)

    def switch_on(self) -> None:
        """Install what the parsed flags ask for.

        Raises:
            WallfacerError: a target is missing or has changed.
        """
        self._apply(lambda entry: entry.given != ALWAYS and entry.enabled_when(self.state))

    def verify(self) -> None:
        """Check that everything installed is still in place.

        Raises:
            WallfacerError: another patch has replaced one of our targets.
        """
        for hook in self._installed():
            hook.verify(self.state.version)

    def uninstall(self) -> None:
        """Leave Megatron as it was found."""
        for hook in reversed(self._installed()):
            hook.undo(self.state.version)
        self.state.hooks.clear()

    def _apply(self, wanted: Callable[[HookEntry], bool]) -> None:
        for hook in (hook for entry, made in self.entries if wanted(entry) for hook in made):
            hook.apply(self.state.version)
            if hook.name not in self.state.hooks:
                self.state.hooks.append(hook.name)

    def _installed(self) -> tuple[Hook, ...]:
        return tuple(hook for hook in self.every if hook.name in self.state.hooks)
