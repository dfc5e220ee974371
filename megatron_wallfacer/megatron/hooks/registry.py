"""All hooks, which are installed in two steps: before and after the flags are parsed."""

from __future__ import annotations

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


class Hooks:
    """The hooks of one process.

    Attributes:
        state: state of the plugin.
        always: installed by :meth:`install`.
        when_on: installed when the flags turn the plugin on.
        when_looped: too, of Megatrons that bring a training loop: losses, and no generation.
        when_packed: too, where they ask for packed sequences that are cut as a whole.
        when_logged: too, where they ask for metrics.
        loss_in_tiles, mlp_in_tiles: too, where they ask for tiles of tokens.
        inputs_on_host: too, where they ask for layer inputs in host memory.
    """

    def __init__(self, state: PluginState) -> None:
        self.state = state
        self.always: tuple[Hook, ...] = (arguments_hook(state, self._switch_on), start_hook(state))
        self.when_on: tuple[Hook, ...] = (
            *groups_hooks(state),
            *core_attention_hooks(state),
            layers_hook(state, self.verify),
        )
        self.when_looped: tuple[Hook, ...] = (
            loss_hook(state),
            *mtp_hooks(),
            generation_hook(state),
        )
        self.when_packed: tuple[Hook, ...] = (rope_hook(),)
        self.when_logged: tuple[Hook, ...] = (metrics_hook(state),)
        self.loss_in_tiles: tuple[Hook, ...] = (loss_tiles_hook(state),)
        self.mlp_in_tiles: tuple[Hook, ...] = (mlp_tiles_hook(state),)
        self.inputs_on_host: tuple[Hook, ...] = (layer_inputs_hook(state),)

    @property
    def every(self) -> tuple[Hook, ...]:
        """All of them, installed or not."""
        return (
            *self.always,
            *self.when_on,
            *self.when_looped,
            *self.when_packed,
            *self.when_logged,
            *self.loss_in_tiles,
            *self.mlp_in_tiles,
            *self.inputs_on_host,
        )

    def install(self) -> None:
        """Put our flags into Megatron's parser, and the comparison of ranks before its groups.

        Raises:
            WallfacerError: the target is missing or has changed.
        """
        self._apply(self.always)

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

    def _switch_on(self) -> None:
        flags = self.state.settings.flags
        for wanted, hooks in (
            (True, self.when_on),
            (True, self.when_looped),
            (shards_whole_sequence(self.state.args), self.when_packed),
            (flags.log_metrics, self.when_logged),
            (flags.loss_tiles is not None, self.loss_in_tiles),
            (flags.mlp_tiles is not None, self.mlp_in_tiles),
            (flags.layer_inputs_on_host is not None, self.inputs_on_host),
        ):
            if wanted:
                self._apply(hooks)

    def _apply(self, hooks: tuple[Hook, ...]) -> None:
        for hook in hooks:
            hook.apply(self.state.version)
            if hook.name not in self.state.hooks:
                self.state.hooks.append(hook.name)

    def _installed(self) -> tuple[Hook, ...]:
        return tuple(hook for hook in self.every if hook.name in self.state.hooks)
