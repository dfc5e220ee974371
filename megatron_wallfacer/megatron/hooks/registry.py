"""List all hooks, and install them in two steps: before and after the flags are parsed."""

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

#: Value of ``HookEntry.given`` for hooks that :meth:`Hooks.install` installs before flags are parsed.
ALWAYS = "always"


@dataclass(frozen=True)
class HookEntry:
    """Hooks that are installed together.

    Attributes:
        given: flag that installs the hooks, or :data:`ALWAYS`.
        make: function that makes the hooks.
        enabled_when: function of the state after parsing that returns whether to install the hooks.
        core: whether attention needs the hooks. Hooks that are not core may support fewer Megatron releases.
    """

    given: str
    make: Callable[[Hooks], tuple[Hook, ...]]
    enabled_when: Callable[[PluginState], bool] = lambda state: True
    core: bool = False


_ON = "--wallfacer-cp-size"

#: Hooks in the order of installation.
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
        entries: (entry, its hooks) for each entry of :data:`ENTRIES`.
    """

    def __init__(self, state: PluginState) -> None:
        self.state = state
        self.entries = tuple((entry, entry.make(self)) for entry in ENTRIES)

    @property
    def every(self) -> tuple[Hook, ...]:
        """All hooks, including those that are not installed."""
        return tuple(hook for _, made in self.entries for hook in made)

    @property
    def core(self) -> tuple[Hook, ...]:
        """Hooks without which attention cannot run."""
        return tuple(hook for entry, made in self.entries if entry.core for hook in made)

    def install(self) -> None:
        """Install the hooks that add flags to Megatron's parser and compare the ranks.

        Raises:
            WallfacerError: A hook's target is missing or has changed.
        """
        self._apply(lambda entry: entry.given == ALWAYS)

    def switch_on(self) -> None:
        """Install the hooks that the parsed flags enable.

        Raises:
            WallfacerError: A hook's target is missing or has changed.
        """
        self._apply(lambda entry: entry.given != ALWAYS and entry.enabled_when(self.state))

    def verify(self) -> None:
        """Check that every installed hook is still in place.

        Raises:
            WallfacerError: Another patch has replaced a hook's target.
        """
        for hook in self._installed():
            hook.verify(self.state.version)

    def uninstall(self) -> None:
        """Restore Megatron's functions."""
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
