"""Correct the losses of multi-token prediction and the shift of its tokens."""

from __future__ import annotations

from megatron_wallfacer.megatron.hook import Hook
from megatron_wallfacer.megatron.mtp import GroupCounts
from megatron_wallfacer.megatron.releases import FIRST_LAUNCHED


def mtp_hooks() -> tuple[Hook, Hook]:
    """Return one hook for the loss function, as bound in the GPT model's module, and one for the shift of tokens."""
    counts = GroupCounts()
    loss = Hook(
        name="MTP loss",
        purpose="takes mean losses of multi-token prediction over the whole context-parallel group",
        target="megatron.core.models.gpt.gpt_model:process_mtp_loss",
        since=FIRST_LAUNCHED,
        parameters=("labels", "loss_mask", "compute_language_model_loss", "config", "cp_group", "packed_seq_params"),
        wrap=counts.wrap_loss,
    )
    roll = Hook(
        name="MTP shift",
        purpose="shifts padded documents by their padded lengths",
        target="megatron.core.transformer.multi_token_prediction:roll_tensor",
        since=FIRST_LAUNCHED,
        parameters=("packed_seq_params",),
        wrap=counts.wrap_roll,
    )
    return loss, roll
