"""The core attention module that Megatron builds in place of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from megatron_wallfacer.engine.autograd import attend
from megatron_wallfacer.engine.call import Call, Runtime
from megatron_wallfacer.engine.timeline import no_observer
from megatron_wallfacer.engine.waits.progress import layer_text
from megatron_wallfacer.errors import OptionError, WallfacerError
from megatron_wallfacer.kernels.protocol import accumulation_dtype
from megatron_wallfacer.megatron.combination import When
from megatron_wallfacer.megatron.extra_state import say_extra_state_is_ignored
from megatron_wallfacer.megatron.flags import as_flag_error
from megatron_wallfacer.megatron.graphs import runner_of
from megatron_wallfacer.megatron.host_memory.attention import kept_sizes
from megatron_wallfacer.megatron.keep import Keeper
from megatron_wallfacer.megatron.layer_selection import mark_as_megatrons
from megatron_wallfacer.megatron.masks import is_window_layer, layer_mask
from megatron_wallfacer.megatron.megatron_graphs import check_config
from megatron_wallfacer.megatron.packed import Batch
from megatron_wallfacer.megatron.plugin_state import PluginState
from megatron_wallfacer.megatron.sinks import NAME, add_sinks, sharded_sinks
from megatron_wallfacer.megatron.unsupported import unsupported
from megatron_wallfacer.schedule.heads import check_heads
from megatron_wallfacer.schedule.mask import Mask
from megatron_wallfacer.schedule.plan import Plan
from megatron_wallfacer.schedule.volume import Shape


class WallfacerCoreAttention(nn.Module):
    """Softmax attention over the context-parallel group, without parameters but those of learnable sinks.

    Megatron builds it from a spec and wants a class there, so each state of the plugin has its own subclass:
    :func:`core_attention_class`.

    Args:
        config: Megatron's TransformerConfig; ``num_query_groups`` as this layer shall see it.
        layer_number: 1-based.
        attn_mask_type: Megatron's AttnMaskType; causal or no_mask.
        attention_type: ``self``.
        softmax_scale: of the scores; 1 / sqrt(head dim) if None.
        pg_collection: Megatron's process groups; ``cp`` is used.
        model_comm_pgs: what it was called in Megatron 0.13 and 0.14.
        cp_comm_type: Megatron's own kind of context parallelism; not supported on the command line, not read here.
        k_channels, v_channels: channels of a head's keys and values; the configuration's ``kv_channels`` if None.
        attention_dropout, num_splits: must be None or 0.

    Attributes:
        keeper: keeps finished forward passes; None without ``--wallfacer-keep-attention-output``.
        softmax_offset: logits of the softmax's sinks, ``[q_heads]`` of this tensor-parallel rank, or None.

    Raises:
        WallfacerError: a layer that the plugin does not support.
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
        _check_heads(plan, q_heads, kv_heads, where)
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
        runtime = Runtime(transfers, kernel, scale, self.state.observer(), graphs=runner_of(settings, transfers))
        mask = layer_mask(config, layer_number, self._causal)
        self._call = Call(plan, runtime, mask=mask, keep_gathered_q=settings.flags.keep_gathered_q, layer=layer_number)
        # Evaluation is no part of a training step: nobody looks on.
        self._unseen = replace(self._call, runtime=replace(runtime, observer=no_observer))
        self._steps = self.state.verified_steps()
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
        """Return attention of the tokens of this rank.

        Args:
            query: sbhd ``[tokens / P, batch, q_heads, head_dim]``, packed thd ``[tokens / P, q_heads, head_dim]``.
            key: keys of the same layout with ``kv_heads``.
            value: values of the same layout with ``kv_heads`` and ``v_head_dim``.
            attention_mask: not read: the mask is what ``attn_mask_type`` says, and flags that make it say less
                than the tensor (``--reset-attention-mask``) stop the run at start.
            attn_mask_type: of this call, else that of the layer.
            attention_bias: must be None.
            packed_seq_params: Megatron's PackedSeqParams, where documents are packed into one sequence.

        Returns:
            ``[tokens / P, batch, q_heads * v_head_dim]``, packed ``[tokens / P, q_heads * v_head_dim]``.

        Raises:
            WallfacerError: something is asked for that the plugin does not support.
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
        batch = self.state.documents().read(packed_seq_params, query.shape[0], where)
        call = replace(call, mask=self._packed_mask(batch, where))
        return self._attend(*(x.unsqueeze(1) for x in (query, key, value)), call).flatten(1)

    def _call_now(self) -> Call:
        """The call of this step."""
        if not self.training:
            return self._unseen
        verified = self._verified if self._steps is not None and self._steps.due() else None
        return self._call if verified is None else verified

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, call: Call) -> Tensor:
        """Attention, sbhd."""
        run = self.keeper.attend if self.keeper is not None and self.training else attend
        return run(query, key, value, call, sinks=getattr(self, NAME))

    def _packed_mask(self, batch: Batch, where: str) -> Mask:
        """The layer's mask within documents.

        Raises:
            WallfacerError: padding would be seen.
        """
        if batch.padded and not self._causal:
            # Padding ends a document: a causal query of it sees none, any other would.
            raise WallfacerError(f"{where}: padded documents need a causal mask with --wallfacer-cp-size")
        if batch.documents is None:
            return self._call.mask
        return self.state.documents().mask(self._call.mask, batch.documents)

    def name_layer(self, name: str) -> None:
        """Give a layer that the decoder does not count, such as one of multi-token prediction, a name for messages."""
        calls = {attribute: getattr(self, attribute) for attribute in ("_call", "_unseen", "_verified")}
        for attribute, call in calls.items():
            if call is not None:
                setattr(self, attribute, replace(call, layer=name))
        if self.keeper is not None:
            self.keeper = Keeper(name)

    def kept_bytes(self, tokens: int, batch: int) -> tuple[int, ...]:
        """Return the bytes of each tensor that a pass of ``batch`` sequences of ``tokens`` per rank keeps."""
        return kept_sizes(self._call, replace(self._shape, tokens=tokens, batch=batch))

    def described(self) -> dict[str, str]:
        """Return what ranks that hold this layer compare: value by name."""
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
        # TransformerEngine's attention leaves such an entry in a checkpoint; it holds nothing that attention needs.
        if f"{prefix}_extra_state" in state_dict:
            del state_dict[f"{prefix}_extra_state"]
            say_extra_state_is_ignored()
        super()._load_from_state_dict(state_dict, prefix, *args)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Learnable sinks, else nothing: a checkpoint does not know which attention computed it."""
        return sharded_sinks(self, self._tp_group, prefix, sharded_offsets, metadata)

    def extra_repr(self) -> str:
        """Return scheme, grid and kernel for the printed model."""
        return f"{self._call.plan.scheme}, {self._call.plan.grid}, kernel={self._call.runtime.kernel.name}"


def core_attention_class(
    state: PluginState, theirs: Callable[..., nn.Module] | None = None
) -> type[WallfacerCoreAttention]:
    """Return the class of attention for Megatron, with the state of the plugin.

    Args:
        state: state of the plugin.
        theirs: Megatron's own attention, for layers that ``--wallfacer-layers`` does not select.
    """
    return type("WallfacerCoreAttention", (WallfacerCoreAttention,), {"state": state, "theirs": theirs})


def _check(when: When, checked: Any, cp_size: int, where: str) -> None:
    """Check a layer's configuration, which a script may have set in code, or what is passed to a call."""
    message = unsupported(when, checked, cp_size)
    if message is not None:
        raise WallfacerError(f"{where}: {message}")


def _heads(config: Any) -> tuple[int, int]:
    """(q heads, kv heads) of a layer on one tensor-parallel rank. Latent attention has keys for every query head."""
    latent = getattr(config, "multi_latent_attention", False)
    both = config.num_attention_heads, config.num_attention_heads if latent else config.num_query_groups
    q_heads, kv_heads = (max(1, heads // config.tensor_model_parallel_size) for heads in both)
    return q_heads, kv_heads


def _check_heads(plan: Plan, q_heads: int, kv_heads: int, where: str) -> None:
    """Whether the layer's heads divide along the head axis; the command line was asked about its own heads."""
    try:
        check_heads(plan, q_heads, kv_heads)
    except OptionError as error:
        raise WallfacerError(f"{where}: {as_flag_error(error)}") from error


def _is_causal(attn_mask_type: Any, where: str) -> bool:
    # By name: the enum's module moves between versions, its names do not.
    if attn_mask_type.name not in ("causal", "no_mask"):
        raise WallfacerError(
            f"{where}: --wallfacer-cp-size supports mask types causal and no_mask, not {attn_mask_type.name}"
        )
    return attn_mask_type.name == "causal"


def _cp_group(pg_collection: Any) -> torch.distributed.ProcessGroup:
    """The context-parallel group that Megatron passes, or its global one where it passes none."""
    group = getattr(pg_collection, "cp", None)
    if group is not None:
        return group
    from megatron.core import parallel_state

    return parallel_state.get_context_parallel_group()
