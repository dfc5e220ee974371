"""The core attention module that Megatron builds in place of its own."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from megatron_wallfacer.engine.autograd import Call, attend
from megatron_wallfacer.engine.run import Runtime
from megatron_wallfacer.errors import OptionError, WallfacerError
from megatron_wallfacer.megatron.arguments import as_flag_error
from megatron_wallfacer.megatron.session import Session
from megatron_wallfacer.schedule.heads import check_heads
from megatron_wallfacer.schedule.plan import Plan


class WallfacerCoreAttention(nn.Module):
    """Parameter-free softmax attention over the context-parallel group.

    Megatron builds it from a spec and wants a class there, so each session has its own subclass:
    :func:`core_attention_class`.

    Args:
        config: Megatron's TransformerConfig; ``num_query_groups`` as this layer shall see it.
        layer_number: 1-based.
        attn_mask_type: Megatron's AttnMaskType; causal or no_mask.
        attention_type: ``self``.
        softmax_scale: of the scores; 1 / sqrt(head dim) if None.
        pg_collection: Megatron's process groups; ``cp`` is used.
        cp_comm_type: Megatron's own kind of context parallelism; refused on the command line, not read here.
        attention_dropout, k_channels, v_channels, num_splits: must be None or what the configuration says.

    Raises:
        WallfacerError: a layer that the plugin does not support.
    """

    session: ClassVar[Session]

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
    ) -> None:
        super().__init__()
        where = f"layer {layer_number}"
        if attention_type != "self":
            raise WallfacerError(f"{where}: --wallfacer-cp-size supports only self attention, not {attention_type}")
        _check_config(config, where)
        given = {"attention_dropout": attention_dropout, "v_channels": v_channels, "num_splits": num_splits}
        for name, value in given.items():
            if value:
                raise WallfacerError(f"{where}: {name} {value} is not supported with --wallfacer-cp-size")
        settings = self.session.settings
        assert settings is not None
        self.layer_number = layer_number
        self._causal = _is_causal(attn_mask_type, where)
        head_dim = k_channels or config.kv_channels
        kernel = self.session.kernel(config.params_dtype, head_dim)
        _check_heads(settings.plan, config, where)
        scale = head_dim**-0.5 if softmax_scale is None else softmax_scale
        runtime = Runtime(self.session.transfers(_cp_group(pg_collection)), kernel, scale, self.session.recorder())
        self._call = Call(settings.plan, runtime, causal=self._causal, keep_gathered_q=settings.keep_gathered_q)

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
        """Attention of this rank's tokens.

        Args:
            query: sbhd ``[tokens / P, batch, q_heads, head_dim]``.
            key, value: sbhd ``[tokens / P, batch, kv_heads, head_dim]``.
            attention_mask: not read: the mask is what ``attn_mask_type`` says, and flags that make it say less
                than the tensor (``--reset-attention-mask``) are refused at start.
            attn_mask_type: of this call, else that of the layer.
            attention_bias, packed_seq_params: must be None.

        Returns:
            ``[tokens / P, batch, q_heads * head_dim]``.

        Raises:
            WallfacerError: something is asked for that the plugin does not support.
        """
        where = f"layer {self.layer_number}"
        if attention_bias is not None:
            raise WallfacerError(f"{where}: an attention bias is not supported with --wallfacer-cp-size")
        if packed_seq_params is not None:
            raise WallfacerError(f"{where}: packed sequences (thd) are not supported with --wallfacer-cp-size")
        if attn_mask_type is not None and _is_causal(attn_mask_type, where) != self._causal:
            raise WallfacerError(f"{where}: mask type {attn_mask_type.name} differs from that of the layer")
        return attend(query, key, value, self._call).flatten(2)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # TransformerEngine's attention leaves such an entry in a checkpoint; it holds nothing that attention needs.
        state_dict.pop(f"{prefix}_extra_state", None)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Nothing: a checkpoint does not know which attention computed it."""
        return {}

    def extra_repr(self) -> str:
        return f"{self._call.plan.scheme}, {self._call.plan.grid}, kernel={self._call.runtime.kernel.name}"


def core_attention_class(session: Session) -> type[WallfacerCoreAttention]:
    """The class to hand to Megatron for this session."""
    return type("WallfacerCoreAttention", (WallfacerCoreAttention,), {"session": session})


def _check_config(config: Any, where: str) -> None:
    """What the command line was checked for, once more where a script may have set it in code."""
    wanted = {
        "attention_dropout": 0,
        "window_size": None,
        "softmax_type": "vanilla",
        "multi_latent_attention": False,
        "fp8_dot_product_attention": False,
        "fp8_multi_head_attention": False,
    }
    for name, only in wanted.items():
        value = getattr(config, name, only)
        if value != only:
            raise WallfacerError(f"{where}: {name} {value} is not supported with --wallfacer-cp-size, only {only}")


def _check_heads(plan: Plan, config: Any, where: str) -> None:
    """Whether the layer's heads divide along the head axis; the command line was asked about its own heads."""
    parallel = config.tensor_model_parallel_size
    q_heads, kv_heads = (max(1, heads // parallel) for heads in (config.num_attention_heads, config.num_query_groups))
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
