"""Trains like scripts/pretrain_gpt.py, and notes how near a token was to another expert."""

import os
import runpy

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.layers import LinearWithGradAccumulationAndAsyncCommunication
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.moe.router import TopKRouter

from tests.support.conversations_training import SCRIPT, read_conversations_alone

GAP = "composition: smallest gap in routing"
route = TopKRouter.routing
gaps = [float("inf")]


def routing(router, logits, *args, **kwargs):
    """As Megatron's; notes by how much the last expert that is taken was before the first that is not."""
    if router.training and router.topk < logits.shape[-1]:
        best = logits.detach().float().topk(router.topk + 1).values
        gaps[0] = min(gaps[0], (best[..., -2] - best[..., -1]).min().item())
    return route(router, logits, *args, **kwargs)


#: Seed of the order in which terms are added up, for runs without the plugin.
ORDER = "COMPOSITION_ORDER"
PIECES = 4
attend = DotProductAttention.forward
backward = LinearWithGradAccumulationAndAsyncCommunication.backward
embed = torch.nn.functional.embedding


build = DotProductAttention.__init__


def build_for_latents(layer, *args, k_channels=None, v_channels=None, **kwargs):
    """As Megatron's, which does not know that values may be narrower or wider than keys; all else in it does."""
    build(layer, *args, **kwargs)
    if v_channels is not None:
        layer.hidden_size_per_partition = layer.num_attention_heads_per_partition * v_channels


def some_order(length: int) -> torch.Tensor:
    """A permutation, the same one every time."""
    return torch.randperm(length, generator=torch.Generator().manual_seed(int(os.environ[ORDER])))


def embed_in_another_order(input, weight, *args, **kwargs):
    """As torch's; the gradients of a word that stands at several places are added up in another order."""
    order = some_order(input.numel())
    rows = embed(input.flatten()[order], weight, *args, **kwargs)
    return rows[order.argsort()].view(*input.shape, -1)


def attend_in_another_order(layer, query, key, value, attention_mask, *args, **kwargs):
    """As Megatron's, keys and values permuted and the mask with them; where it makes the mask itself, they stay."""
    if layer.config.window_size is not None or attention_mask is None:
        return attend(layer, query, key, value, attention_mask, *args, **kwargs)
    order = some_order(key.shape[0])
    return attend(layer, query, key[order], value[order], attention_mask[..., order], *args, **kwargs)


def backward_in_another_order(ctx, grad_output):
    """As Megatron's linear layer; the gradient of a weight is rounded in pieces before they are added up in fp32.

    Where ranks have parts of the tokens, or micro-batches are smaller, that is how it comes about.
    """
    grads = list(backward(ctx, grad_output))
    rows, _ = ctx.saved_tensors[:2]
    if ctx.sequence_parallel:
        parts = [torch.empty_like(rows) for _ in range(ctx.tp_group.size())]
        dist.all_gather(parts, rows.contiguous(), group=ctx.tp_group)
        rows = torch.cat(parts)
    if grads[1] is not None:
        rows, columns = rows.flatten(0, -2), grad_output.flatten(0, -2)
        pieces = some_order(rows.shape[0]).chunk(PIECES)
        grads[1] = sum((columns[piece].t() @ rows[piece]).float() for piece in pieces).to(grads[1].dtype)
    return tuple(grads)


def main() -> None:
    read_conversations_alone()
    TopKRouter.routing = routing
    DotProductAttention.__init__ = build_for_latents
    if ORDER in os.environ:
        DotProductAttention.forward = attend_in_another_order
        torch.nn.functional.embedding = embed_in_another_order
        LinearWithGradAccumulationAndAsyncCommunication.backward = staticmethod(backward_in_another_order)
    runpy.run_path(str(SCRIPT), run_name="__main__")
    print(f"{GAP} {gaps[0]:.3e}", flush=True)


if __name__ == "__main__":
    main()
