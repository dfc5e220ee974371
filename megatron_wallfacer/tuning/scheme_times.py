"""Compute the results of ``wallfacer bench``: medians, rates, and whether outputs differ by more than a tolerance."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from statistics import median

import torch

from megatron_wallfacer.planning.costs import BACKWARD_FLOPS, FORWARD_FLOPS
from megatron_wallfacer.schedule.plan import Plan
from megatron_wallfacer.tuning.attention_times import AttentionWorkload, PassTimes

#: Allowed difference between two schemes relative to the largest entry, because schemes add in different orders.
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class SchemeTimes:
    """Times of one scheme for one attention layer on the slowest rank.

    Attributes:
        scheme: value of ``--wallfacer-scheme``.
        grid: axes with their sizes.
        median_ms: median of forward plus backward, in ms.
        forward_ms, backward_ms: medians of forward and of backward, in ms.
        fastest_ms, slowest_ms: fastest and slowest run of forward plus backward, in ms.
        ratio: ``median_ms`` divided by the ``median_ms`` of the first scheme.
        tokens_s: tokens of the whole job per second.
        tflops: 1e12 floating-point operations per second and rank. A causal mask halves the number of floating-point
            operations.
        difference: largest |x - y| / max(|y|) of out, dq, dk and dv, where y is the result of the first scheme.
        tolerance: largest allowed value of ``difference``.
    """

    scheme: str
    grid: str
    median_ms: float
    forward_ms: float
    backward_ms: float
    fastest_ms: float
    slowest_ms: float
    ratio: float
    tokens_s: float
    tflops: float
    difference: float
    tolerance: float

    @property
    def agrees(self) -> bool:
        """Whether ``difference`` is at most ``tolerance``."""
        return self.difference <= self.tolerance


def scheme_times(
    schemes: Sequence[str],
    plans: Sequence[Plan],
    times: Sequence[Sequence[PassTimes]],
    differences: Sequence[float],
    workload: AttentionWorkload,
) -> list[SchemeTimes]:
    """Return one result per scheme, in the order of ``schemes``. ``times`` has at least one run of each scheme."""
    first = median(sample.seconds for sample in times[0])
    results = []
    for scheme, plan, samples, difference in zip(schemes, plans, times, differences, strict=True):
        seconds = [sample.seconds for sample in samples]
        middle, cp_size = median(seconds), plan.grid.cp_size
        results.append(
            SchemeTimes(
                scheme,
                str(plan.grid),
                median_ms=1e3 * middle,
                forward_ms=1e3 * median(sample.forward_s for sample in samples),
                backward_ms=1e3 * median(sample.backward_s for sample in samples),
                fastest_ms=1e3 * min(seconds),
                slowest_ms=1e3 * max(seconds),
                ratio=middle / first,
                tokens_s=workload.shape.batch * workload.shape.tokens * cp_size / middle,
                tflops=_flops(workload, cp_size) / middle / 1e12,
                difference=difference,
                tolerance=TOLERANCES[workload.dtype],
            )
        )
    return results


def as_csv(results: Iterable[SchemeTimes]) -> str:
    """Return comma-separated values: one line of headings, and one line per scheme."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(SchemeTimes)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(result) for result in results)
    return text.getvalue()


def _flops(workload: AttentionWorkload, cp_size: int) -> float:
    """Return the number of floating-point operations of one rank in one forward and one backward of attention."""
    shape = workload.shape
    pairs = shape.tokens * cp_size * shape.tokens * (0.5 if workload.causal else 1.0)
    return (FORWARD_FLOPS + BACKWARD_FLOPS) * shape.batch * pairs * shape.q_heads * shape.head_dim
