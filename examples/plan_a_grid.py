"""Compare grids before a run, without GPUs: volume and memory per scheme, and what ``auto`` chooses."""

from megatron_wallfacer.schedule.formulas import backward_volume, busiest_rank, forward_volume
from megatron_wallfacer.schedule.memory import peak_bytes
from megatron_wallfacer.schedule.schedule import forward_schedule
from megatron_wallfacer.schedule.schemes import make_plan
from megatron_wallfacer.schedule.volume import Shape

RANKS, TOKENS = 16, 8192  # context-parallel ranks, tokens per rank
SHAPE = Shape(tokens=TOKENS, q_heads=32, kv_heads=8, head_dim=128)


def main() -> None:
    """Print a line per scheme. Volume is in query shards that a rank receives for one layer."""
    for scheme in ("auto", "ring", "double-ring", "usp", "wallfacer"):
        plan = make_plan(scheme, RANKS, q_heads=SHAPE.q_heads, kv_heads=SHAPE.kv_heads, tokens=TOKENS)
        volume = [count(plan, SHAPE.kappa, kv_heads=SHAPE.kv_heads) for count in (forward_volume, backward_volume)]
        held = peak_bytes(forward_schedule(plan, busiest_rank(plan)), SHAPE)
        print(
            f"{scheme:<12} {plan.grid!s:<42} volume {volume[0]:5.2f} {volume[1]:6.2f}   buffers {held / 2**20:5.0f} MiB"
        )


if __name__ == "__main__":
    main()
