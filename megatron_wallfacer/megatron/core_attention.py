"""Define the core attention module that replaces Megatron's own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from megatron_wallfacer.engine.autograd import attend
from megatron_wallfacer.engine.call import Call, Runtime
from megatron_wallfacer.engine.timeline import no_observer
from megatron_wallfacer.engine.waits.progress import layer_text
from megatron_wallfacer.errors import WallfacerError
from megatron_wallfacer.kernels.protocol import accumulation_dtype
from megatron_wallfacer.megatron.combination import When
from megatron_wallfacer.megatron.flags import flag_errors
from megatron_wallfacer.megatron.graphs import runner_of
from megatron_wallfacer.megatron.host_memory.attention import kept_sizes
from megatron_wallfacer.megatron.keep import Keeper
from megatron_wallfacer.megatron.layer_selection import mark_as_megatrons
from megatron_wallfacer.megatron.masks import is_window_layer, layer_mask
from megatron_wallfacer.megatron.megatron_graphs import check_config
from megatron_wallfacer.megatron.outputs import say
from megatron_wallfacer.megatron.packed import Batch
from megatron_wallfacer.megatron.plugin_state import PluginState
from megatron_wallfacer.megatron.sinks import NAME, add_sinks, sharded_sinks
from megatron_wallfacer.megatron.unsupported import unsupported
from megatron_wallfacer.schedule.heads import check_heads
from megatron_wallfacer.schedule.mask import Mask
from megatron_wallfacer.schedule.volume import Shape


class WallfacerCoreAttention(nn.Module):
    """Softmax attention over the context-parallel group. The module has no parameters except learnable sinks.

    Megatron's layer specs need a class, so :func:`core_attention_class` makes a subclass for each ``PluginState``.

    Args:
        config: Megatron's TransformerConfig of the layer.
        layer_number: number of the layer from 1.
        attn_mask_type: Megatron's AttnMaskType, causal or no_mask.
        attention_type: must be ``self``.
        softmax_scale: factor of the scores, or None for 1 / sqrt(head dim).
        pg_collection: Megatron's process groups, of which ``cp`` and ``tp`` are used.
        model_comm_pgs: name of ``pg_collection`` in Megatron 0.13 and 0.14.
        cp_comm_type: Megatron's own kind of context parallelism, which is ignored.
        k_channels, v_channels: channels per key and value head, or None for the configuration's ``kv_channels``.
        attention_dropout, num_splits: must be None or 0.

    Attributes:
        keeper: store of finished forward passes, or None without ``--wallfacer-keep-attention-output``.
        softmax_offset: sink logits of this tensor-parallel rank, ``[q_heads]``, or None.

    Raises:
        WallfacerError: The plugin does not support the layer.
    """

    state: ClassVar[PluginState]
    theirs: ClassVar[Callable[..., nn.Module] | None] = None

    def __new__(cls, config: Any, layer_number: int, *args: Any, **kwargs: Any) -> Any:
        """Return this module, or Megatron's own attention for a layer that ``--wallfacer-layers`` does not select."""
        selection = cls.state.settings.layers
        if selection is None or selection.includes(config, layer_number):
            return super().__new__(cls)
        assert cls.theirs is not None
        return mark_as_megatrons(cls.theirs(config, layer_number, *args, **kwargs))

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        softmax_scale: float | None = None,
        pg_collection: Any = None,
        cp_comm_type: str | None = None,
        attention_dropout: float | None = None,
        k_channels: int | None = None,
        v_channels: int | None = None,
        num_splits: int | None = None,
        model_comm_pgs: Any = None,
    ) -> None:
        super().__init__()
        pg_collection = model_comm_pgs if pg_collection is None else pg_collection
        where = f"layer {layer_number}"
        if attention_type != "self":
            raise WallfacerError(f"{where}: --wallfacer-cp-size supports only self attention, not {attention_type}")
        settings = self.state.settings
        _check("model", config, settings.plan.grid.cp_size, where)
        for name, value in {"attention_dropout": attention_dropout, "num_splits": num_splits}.items():
            if value:
                raise WallfacerError(f"{where}: {name} {value} is not supported with --wallfacer-cp-size")
        check_config(config, settings.megatron_graphs, where)
        self.layer_number, self._config = layer_number, config
        self._causal = _is_causal(attn_mask_type, where)
        plan = settings.plan_of(window=is_window_layer(config, layer_number))
        q_heads, kv_heads = _heads(config)
        with flag_errors(f"{where}: "):
            # The heads of a layer can differ from those of the command line.
            check_heads(plan, q_heads, kv_heads)
        head_dim = k_channels or config.kv_channels
        kernel = self.state.kernel(config.params_dtype, head_dim, v_channels)
        self._dtype = config.params_dtype
        itemsizes = self._dtype.itemsize, accumulation_dtype(self._dtype).itemsize
        self._shape = Shape(1, q_heads, kv_heads, head_dim, v_channels, 1, *itemsizes)
        self._softmax_type = getattr(config, "softmax_type", "vanilla")
        add_sinks(self, config, q_heads, self.state.device, where)
        self._tp_group = getattr(pg_collection, "tp", None)
        scale = head_dim**-0.5 if softmax_scale is None else softmax_scale
        transfers = self.state.transfers(_cp_group(pg_collection), plan.grid)
        runtime = Runtime(transfers, kernel, scale, self.state.observer, graphs=runner_of(settings, transfers))
        mask = layer_mask(config, layer_number, self._causal)
        self._call = Call(plan, runtime, mask=mask, keep_gathered_q=settings.flags.keep_gathered_q, layer=layer_number)
        # Timelines and metrics cover training steps only, so evaluation runs without an observer.
        self._unseen = replace(self._call, runtime=replace(runtime, observer=no_observer))
        self._steps = self.state.verified_steps
        self._verified = replace(self._call, verify=True) if self._steps is not None else None
        self.keeper = Keeper(where) if settings.flags.keep_attention_output else None

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> Tensor:
        """Return the attention output of this rank's tokens.

        Args:
            query: sbhd ``[tokens / P, batch, q_heads, head_dim]``, packed thd ``[tokens / P, q_heads, head_dim]``.
            key: keys in the layout of ``query``, with ``kv_heads`` in place of ``q_heads``.
            value: values in the layout of ``key``, with ``v_head_dim`` in place of ``head_dim``.
            attention_mask: ignored, because ``attn_mask_type`` gives the mask. The flag ``--reset-attention-mask``
                changes only ``attention_mask``, so the plugin does not support this flag.
            attn_mask_type: None, or the mask type of the layer.
            attention_bias: must be None.
            packed_seq_params: Megatron's PackedSeqParams if documents are packed into one sequence.

        Returns:
            ``[tokens / P, batch, q_heads * v_head_dim]``, packed ``[tokens / P, q_heads * v_head_dim]``.

        Raises:
            WallfacerError: The plugin does not support an argument.
        """
        where = layer_text(self._call.layer)
        if attention_bias is not None:
            raise WallfacerError(f"{where}: an attention bias is not supported with --wallfacer-cp-size")
        if attn_mask_type is not None and _is_causal(attn_mask_type, where) != self._causal:
            raise WallfacerError(f"{where}: mask type {attn_mask_type.name} differs from that of the layer")
        call = self._call_now()
        source = self._config if packed_seq_params is None else packed_seq_params
        _check("call", source, call.plan.grid.cp_size, where)
        if packed_seq_params is None:
            return self._attend(query, key, value, call).flatten(2)
        batch = self.state.documents.read(packed_seq_params, query.shape[0], where)
        call = replace(call, mask=self._packed_mask(batch, where))
        return self._attend(*(x.unsqueeze(1) for x in (query, key, value)), call).flatten(1)

    def _call_now(self) -> Call:
        if not self.training:
            return self._unseen
        verified = self._verified if self._steps is not None and self._steps.due() else None
        return self._call if verified is None else verified

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, call: Call) -> Tensor:
        run = self.keeper.attend if self.keeper is not None and self.training else attend
        return run(query, key, value, call, sinks=getattr(self, NAME))

    def _packed_mask(self, batch: Batch, where: str) -> Mask:
        if batch.padded and not self._causal:
            # Padding follows the tokens of a document, so only a causal mask hides padding from the tokens.
            raise WallfacerError(f"{where}: padded documents need a causal mask with --wallfacer-cp-size")
        if batch.documents is None:
            return self._call.mask
        return self.state.documents.mask(self._call.mask, batch.documents)

    def name_layer(self, name: str) -> None:
        """Set the name of the layer in messages, such as ``MTP depth 1``."""
        calls = {attribute: getattr(self, attribute) for attribute in ("_call", "_unseen", "_verified")}
        for attribute, call in calls.items():
            if call is not None:
                setattr(self, attribute, replace(call, layer=name))
        if self.keeper is not None:
            self.keeper = Keeper(name)

    def kept_bytes(self, tokens: int, batch: int) -> tuple[int, ...]:
        """Return the bytes of each tensor that one micro-batch keeps for backward, given ``tokens`` per rank."""
        return kept_sizes(self._call, replace(self._shape, tokens=tokens, batch=batch))

    def described(self) -> dict[str, str]:
        """Return the properties that must be equal on all ranks with this layer, by name."""
        call, mask, runtime, shape = self._call, self._call.mask, self._call.runtime, self._shape
        return {
            "mask": "causal" if self._causal else "full",
            "window": f"{mask.left},{mask.right}",
            "scale": f"{runtime.scale:.9g}",
            "softcap": f"{runtime.softcap:g}",
            "sinks": self._softmax_type,
            "heads": f"{shape.q_heads} query and {shape.kv_heads} kv of {shape.head_dim} channels",
            "dtype": str(self._dtype),
            "kernel": runtime.kernel.name,
            "plan": str(call.plan),
        }

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # A checkpoint of TransformerEngine's attention has this entry. Attention does not need it.
        if f"{prefix}_extra_state" in state_dict:
            del state_dict[f"{prefix}_extra_state"]
            _say_extra_state_is_ignored()
        super()._load_from_state_dict(state_dict, prefix, *args)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Return the checkpoint entries of learnable sinks, or an empty dict without sinks."""
        return sharded_sinks(self, self._tp_group, prefix, sharded_offsets, metadata)

    def extra_repr(self) -> str:
        """Return scheme, grid and kernel, which ``print(model)`` shows."""
        return f"{self._call.plan.scheme}, {self._call.plan.grid}, kernel={self._call.runtime.kernel.name}"


def core_attention_class(
    state: PluginState, theirs: Callable[..., nn.Module] | None = None
) -> type[WallfacerCoreAttention]:
    """Return a subclass of the attention module for Megatron's layer specs.

    The class ``theirs`` is Megatron's own attention, for layers that ``--wallfacer-layers`` does not select.
    """
    return type("WallfacerCoreAttention", (WallfacerCoreAttention,), {"state": state, "theirs": theirs})


@cache
def _say_extra_state_is_ignored() -> None:
    say(
        "the checkpoint's core_attention._extra_state entries are TransformerEngine's; "
        "they are ignored, because the plugin's attention does not need them"
    )


def _check(when: When, checked: Any, cp_size: int, where: str) -> None:
    message = unsupported(when, checked, cp_size)
    if message is not None:
        raise WallfacerError(f"{where}: {message}")


def _heads(config: Any) -> tuple[int, int]:
    """Return (query heads, kv heads) per tensor-parallel rank. Latent attention has a key for every query head."""
    latent = getattr(config, "multi_latent_attention", False)
    both = config.num_attention_heads, config.num_attention_heads if latent else config.num_query_groups
    q_heads, kv_heads = (max(1, heads // config.tensor_model_parallel_size) for heads in both)
    return q_heads, kv_heads


def _is_causal(attn_mask_type: Any, where: str) -> bool:
    # Compare names, because Megatron releases define the enum in different modules.
    if attn_mask_type.name not in ("causal", "no_mask"):
        raise WallfacerError(
            f"{where}: --wallfacer-cp-size supports mask types causal and no_mask, not {attn_mask_type.name}"
        )
    return attn_mask_type.name == "causal"


def _cp_group(pg_collection: Any) -> torch.distributed.ProcessGroup:
    """Return the context-parallel group that Megatron passes, or Megatron's global group if Megatron passes none."""
    group = getattr(pg_collection, "cp", None)
    if group is not None:
        return group
    from megatron.core import parallel_state

    return parallel_state.get_context_parallel_group()
