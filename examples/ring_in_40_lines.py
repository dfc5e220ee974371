"""Causal ring attention of P ranks as a plain loop. Run it: it compares the result with dense attention."""

import torch


def shards(x: torch.Tensor, ranks: int) -> list[torch.Tensor]:
    """Split dimension 1 zig-zag: rank r of P gets chunks r and 2P-1-r of 2P, an early and a late one."""
    chunks = x.chunk(2 * ranks, dim=1)
    return [torch.cat([chunks[r], chunks[2 * ranks - 1 - r]], dim=1) for r in range(ranks)]


def ring_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, ranks: int) -> list[torch.Tensor]:
    """Return the output of each rank, ``[batch, tokens / P, heads, head_dim]``; q, k, v are those of all tokens."""
    q, k, v = (shards(x, ranks) for x in (q, k, v))
    position = shards(torch.arange(q[0].shape[1] * ranks)[None], ranks)  # of each token in the sequence
    out = [torch.zeros_like(x) for x in q]
    lse = [torch.full(x.shape[:3], -torch.inf, dtype=x.dtype) for x in q]  # log of the sum of exp(scores) so far
    held = list(range(ranks))  # held[r]: the rank from which the keys and values come that rank r holds now
    for _ in range(ranks):  # ring steps
        for rank, origin in enumerate(held):  # on a cluster all ranks do this at the same time
            scores = torch.einsum("bqhd,bkhd->bqhk", q[rank], k[origin]) * q[rank].shape[-1] ** -0.5
            hidden = position[rank][0, :, None, None] < position[origin][0]  # keys after the query
            scores = scores.masked_fill(hidden, -torch.inf)
            new_lse = torch.logaddexp(lse[rank], scores.logsumexp(-1))
            old = out[rank] * (lse[rank] - new_lse).exp()[..., None]  # scale what is there to the new sum
            out[rank] = old + torch.einsum("bqhk,bkhd->bqhd", (scores - new_lse[..., None]).exp(), v[origin])
            lse[rank] = new_lse
        held = [held[rank - 1] for rank in range(ranks)]  # every rank sends its block to the next rank
    return out


if __name__ == "__main__":
    q, k, v = torch.randn(3, 1, 64, 2, 16, dtype=torch.float64)
    dense = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=True)
    expected = shards(dense.transpose(1, 2), ranks=4)
    errors = [(a - b).abs().max().item() for a, b in zip(ring_attention(q, k, v, ranks=4), expected, strict=True)]
    print(f"largest difference from dense attention: {max(errors):.1e}")
