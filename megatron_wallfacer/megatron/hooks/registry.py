"""List all hooks, and install them in two steps: before and after the flags are parsed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from megatron_wallfacer.megatron.flags import Flags, flag_name
from megatron_wallfacer.megatron.hook import Hook
from megatron_wallfacer.megatron.hooks.arguments import arguments_hook
from megatron_wallfacer.megatron.hooks.core_attention import core_attention_hooks, generation_hook
from megatron_wallfacer.megatron.hooks.groups import dropped_groups_hook, groups_hook
from megatron_wallfacer.megatron.hooks.layers import layers_hook
from megatron_wallfacer.megatron.hooks.loss import loss_hook
from megatron_wallfacer.megatron.hooks.memory import layer_inputs_hook, loss_tiles_hook, mlp_tiles_hook
from megatron_wallfacer.megatron.hooks.metrics import metrics_hook
from megatron_wallfacer.megatron.hooks.mtp import mtp_loss_hook, mtp_shift_hook
from megatron_wallfacer.megatron.hooks.rope import rope_hook
from megatron_wallfacer.megatron.hooks.start import start_hook
from megatron_wallfacer.megatron.packed import shards_whole_sequence
from megatron_wallfacer.megatron.plugin_state import PluginState

#: Value of ``HookEntry.given`` for hooks that :meth:`Hooks.install` installs before flags are parsed.
ALWAYS = "always"


@dataclass(frozen=True)
class HookEntry:
    """Hooks that are installed together.

    Attributes:
        given: flag that installs the hooks, or :data:`ALWAYS`.
        hooks: hooks that are not yet bound to the plugin's state.
        enabled_when: function that gets the plugin's state after parsing, and returns whether to install the hooks.
        core: whether the plugin's attention needs these hooks. All other hooks may support fewer Megatron releases.
    """

    given: str
    hooks: tuple[Hook, ...]
    enabled_when: Callable[[PluginState], bool] = lambda state: True
    core: bool = False


def _of_flag(option: str, hook: Hook) -> HookEntry:
    default = getattr(Flags, option)
    return HookEntry(flag_name(option), (hook,), lambda state: getattr(state.settings.flags, option) != default)


_ON = flag_name("cp_size")

#: Hooks in the order of installation.
ENTRIES = (
    HookEntry(ALWAYS, (arguments_hook, start_hook), core=True),
    HookEntry(_ON, (groups_hook, dropped_groups_hook), core=True),
    HookEntry(_ON, core_attention_hooks, core=True),
    HookEntry(_ON, (layers_hook,), core=True),
    HookEntry(_ON, (loss_hook, mtp_loss_hook, mtp_shift_hook, generation_hook)),
    HookEntry("--dataloader-inter-document-masking", (rope_hook,), lambda state: shards_whole_sequence(state.args)),
    _of_flag("log_metrics", metrics_hook),
    _of_flag("loss_tiles", loss_tiles_hook),
    _of_flag("mlp_tiles", mlp_tiles_hook),
    _of_flag("layer_inputs_on_host", layer_inputs_hook),
)


class Hooks:
    """The hooks of one process.

    Attributes:
        state: state of the plugin.
        entries: pairs (element of :data:`ENTRIES`, hooks of this element bound to ``state``).
    """

    def __init__(self, state: PluginState) -> None:
        self.state, state.switch_on = state, self.switch_on
        self.entries = tuple((entry, tuple(hook.bind(state) for hook in entry.hooks)) for entry in ENTRIES)

    @property
    def every(self) -> tuple[Hook, ...]:
        """All hooks, including those that are not installed."""
        return tuple(hook for _, hooks in self.entries for hook in hooks)

    @property
    def core(self) -> tuple[Hook, ...]:
        """Hooks without which attention cannot run."""
        return tuple(hook for entry, hooks in self.entries if entry.core for hook in hooks)

    def install(self) -> None:
        """Install the hooks that every run needs: they add flags to Megatron's parser and compare ranks' settings."""
        self._apply(lambda entry: entry.given == ALWAYS)

    def switch_on(self) -> None:
        """Install the hooks that the parsed flags enable."""
        self._apply(lambda entry: entry.given != ALWAYS and entry.enabled_when(self.state))

    def uninstall(self) -> None:
        """Restore Megatron's functions."""
        for hook in reversed(self.state.hooks):
            hook.undo(self.state.version)
        self.state.hooks.clear()

    def _apply(self, wanted: Callable[[HookEntry], bool]) -> None:
        for hook in (hook for entry, hooks in self.entries if wanted(entry) for hook in hooks):
            hook.apply(self.state.version)
            if hook not in self.state.hooks:
                self.state.hooks.append(hook)
