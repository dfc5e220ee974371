"""All hooks of a session, installed in two goes."""

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
from megatron_wallfacer.megatron.session import Session


class Hooks:
    """The hooks of one session.

    Attributes:
        session: what they share.
        always: installed by :meth:`install`.
        when_on: installed when the flags turn the plugin on.
        when_looped: too, of Megatrons that bring a training loop: losses, and no generation.
        when_packed: too, where they ask for packed sequences that are cut as a whole.
        when_logged: too, where they ask for metrics.
        loss_in_tiles, mlp_in_tiles: too, where they ask for tiles of tokens.
        inputs_on_host: too, where they ask for layer inputs in host memory.
    """

    def __init__(self, session: Session) -> None:
        self.session = session
        self.always: tuple[Hook, ...] = (arguments_hook(session, self._switch_on), start_hook(session))
        self.when_on: tuple[Hook, ...] = (
            *groups_hooks(session),
            *core_attention_hooks(session),
            layers_hook(session, self.verify),
        )
        self.when_looped: tuple[Hook, ...] = (
            loss_hook(session),
            *mtp_hooks(),
            generation_hook(session),
        )
        self.when_packed: tuple[Hook, ...] = (rope_hook(),)
        self.when_logged: tuple[Hook, ...] = (metrics_hook(session),)
        self.loss_in_tiles: tuple[Hook, ...] = (loss_tiles_hook(session),)
        self.mlp_in_tiles: tuple[Hook, ...] = (mlp_tiles_hook(session),)
        self.inputs_on_host: tuple[Hook, ...] = (layer_inputs_hook(session),)

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
            hook.verify(self.session.version)

    def uninstall(self) -> None:
        """Leave Megatron as it was found."""
        for hook in reversed(self._installed()):
            hook.undo(self.session.version)
        self.session.hooks.clear()

    def _switch_on(self) -> None:
        assert self.session.settings is not None
        flags = self.session.settings.flags
        for wanted, hooks in (
            (True, self.when_on),
            (True, self.when_looped),
            (shards_whole_sequence(self.session.args), self.when_packed),
            (flags.log_metrics, self.when_logged),
            (flags.loss_tiles is not None, self.loss_in_tiles),
            (flags.mlp_tiles is not None, self.mlp_in_tiles),
            (flags.layer_inputs_on_host is not None, self.inputs_on_host),
        ):
            if wanted:
                self._apply(hooks)

    def _apply(self, hooks: tuple[Hook, ...]) -> None:
        for hook in hooks:
            hook.apply(self.session.version)
            if hook.name not in self.session.hooks:
                self.session.hooks.append(hook.name)

    def _installed(self) -> tuple[Hook, ...]:
        return tuple(hook for hook in self.every if hook.name in self.session.hooks)
