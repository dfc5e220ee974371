"""The core attention module that Megatron builds in place of its own."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from megatron_wallfacer.engine.autograd import Call, attend
from megatron_wallfacer.engine.runtime import Runtime
from megatron_wallfacer.errors import WallfacerError
from megatron_wallfacer.megatron.session import Session


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
        **ignored: what other versions pass, ``cp_comm_type`` for instance, refused earlier where it matters.

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
        **ignored: Any,
    ) -> None:
        super().__init__()
        where = f"layer {layer_number}"
        if attention_type != "self":
            raise WallfacerError(f"{where}: --wallfacer-cp-size supports only self attention, not {attention_type}")
        settings = self.session.settings
        assert settings is not None
        self.layer_number = layer_number
        self._causal = _is_causal(attn_mask_type, where)
        head_dim = config.kv_channels
        kernel = self.session.kernel(config.params_dtype, head_dim)
        scale = head_dim**-0.5 if softmax_scale is None else softmax_scale
        runtime = Runtime(self.session.transfers(_cp_group(pg_collection)), kernel, scale)
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

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Nothing: a checkpoint does not know which attention computed it."""
        return {}

    def extra_repr(self) -> str:
        return f"{self._call.plan.scheme}, {self._call.plan.grid}, kernel={self._call.runtime.kernel.name}"


def core_attention_class(session: Session) -> type[WallfacerCoreAttention]:
    """The class to hand to Megatron for this session."""
    return type("WallfacerCoreAttention", (WallfacerCoreAttention,), {"session": session})


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
