"""Figures 7 and 9 of the WallFacer paper, simulated: the ring, WallFacer, and the planner's own grid."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType

from benchmarks.paper.published import CAUSAL, PROGRAM, PublishedThroughput, published
from megatron_wallfacer.errors import OptionError
from megatron_wallfacer.planning.choice import AttentionJob, Choice
from megatron_wallfacer.planning.cluster import Cluster
from megatron_wallfacer.planning.model import Model
from megatron_wallfacer.planning.search import search
from megatron_wallfacer.planning.simulator import simulate
from megatron_wallfacer.planning.symmetry import Symmetry
from megatron_wallfacer.planning.training_options import parallel_sizes
from megatron_wallfacer.planning.training_step import StepEstimate, attention_job, estimate_step, simulated_attention
from megatron_wallfacer.schedule.plan import Plan
from megatron_wallfacer.schedule.schemes import make_plan

#: Team sizes C by figure. The text of figure 9 names none.
TEAM_SIZES = {7: (2, 4), 9: (2, 4, 8)}
#: Relative difference below which two throughputs are a tie.
TIE = 0.03
#: Grids from the planner's search that are compared again with the paper's program.
SHORTLIST = 8
_PLACEMENTS = ("teams-adjacent", "rings-adjacent")
#: Placements by reading and cluster; the paper does not state them. ``each``: the better one for each team size.
#: ``cluster``: one per cluster, because section 4.4 searches once per cluster; these fit best. Or the same everywhere.
READINGS: Mapping[str, Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {
        "each": {"A100_16": _PLACEMENTS, "A100_8": _PLACEMENTS, "H100_8": _PLACEMENTS},
        "cluster": {"A100_16": _PLACEMENTS[:1], "A100_8": _PLACEMENTS[:1], "H100_8": _PLACEMENTS[1:]},
    }
    | {placement: dict.fromkeys(("A100_16", "A100_8", "H100_8"), (placement,)) for placement in _PLACEMENTS}
)


@dataclass(frozen=True)
class Case:
    """One cluster, model and sequence length: several throughputs of a figure.

    Attributes:
        figure: 7 or 9.
        cluster: calibrated cluster.
        model: trained model.
        tokens: sequence length.
        paper: published throughput by scheme, 1000 tokens per second.
        ours: predicted throughput by scheme; for WallFacer at the best placement of each team size.
        placements: best placement by scheme.
    """

    figure: int
    cluster: Cluster
    model: Model
    tokens: int
    paper: dict[str, float]
    ours: dict[str, float]
    placements: dict[str, str]

    @property
    def name(self) -> str:
        """Cluster, ranks, model and length, for tables."""
        return f"{self.cluster.name} {self.cluster.ranks:>2} {self.model.name} {self.tokens // 1024}K"

    def gain(self, scheme: str, *, paper: bool) -> float:
        """Return the gain of a scheme over the ring in percent: published, or predicted."""
        rates = self.paper if paper else self.ours
        return 100 * (rates[scheme] / rates["ring"] - 1)

    @property
    def best_is_right(self) -> bool:
        """Whether the predicted best team size is the published one, or ties with it in either result."""
        names, enough = [name for name in self.paper if name != "ring"], 1 - TIE
        ours, paper = (max(names, key=rates.__getitem__) for rates in (self.ours, self.paper))
        return self.paper[ours] >= enough * self.paper[paper] or self.ours[paper] >= enough * self.ours[ours]


@dataclass(frozen=True)
class Summary:
    """Agreement of predicted with published results.

    Attributes:
        best_right: cases whose best team size is predicted.
        cases: cases that state a best team size; figure 9 publishes only the best.
        signs_right: gains whose predicted sign is the published one.
        gains: all gains over the ring.
        error_points: mean absolute error of the gains, percentage points.
        throughput_error: mean absolute error of the throughputs, percent.
    """

    best_right: int
    cases: int
    signs_right: int
    gains: int
    error_points: float
    throughput_error: float

    def __str__(self) -> str:
        best = f"best C right {self.best_right} of {self.cases}, " if self.cases else ""
        return (
            f"{best}sign of the gain right {self.signs_right} of "
            f"{self.gains}, mean error of the gains {self.error_points:.1f} points, of the throughputs "
            f"{self.throughput_error:.0f} %"
        )


def simulate_figure(figure: int, reading: str = "each") -> list[Case]:
    """Return every case of a figure, simulated.

    Args:
        figure: 7 or 9.
        reading: key of :data:`READINGS`.

    Raises:
        OptionError: there is no such figure or reading.
    """
    if figure not in TEAM_SIZES:
        raise OptionError("figure", figure, "7 or 9")
    if reading not in READINGS:
        raise OptionError("reading", reading, f"one of {', '.join(READINGS)}")
    cases: dict[tuple, list[PublishedThroughput]] = {}
    for point in published(figure):
        cases.setdefault((point.cluster, point.model, point.tokens), []).append(point)
    return [_case(points, READINGS[reading][points[0].cluster.name]) for points in cases.values()]


def _case(points: Sequence[PublishedThroughput], placements: tuple[str, ...]) -> Case:
    first = points[0]
    job = first.cluster, first.model, first.tokens
    ours, best_placement = {"ring": paper_step(*job, "ring").tokens_s / 1e3}, {}
    for size in TEAM_SIZES[first.figure]:
        if first.cluster.ranks % (size * size) == 0:
            rates = {name: paper_step(*job, "wallfacer", size, name).tokens_s / 1e3 for name in placements}
            best_placement[f"wallfacer-{size}"] = max(rates, key=rates.__getitem__)
            ours[f"wallfacer-{size}"] = max(rates.values())
    if first.figure == 9:
        best = max(best_placement, key=ours.__getitem__)
        ours = {"ring": ours["ring"], "wallfacer-best": ours[best]}
        best_placement = {"wallfacer-best": f"{best} {best_placement[best]}"}
    return Case(first.figure, *job, {point.scheme: point.k_tokens_s for point in points}, ours, best_placement)


@cache
def paper_step(
    cluster: Cluster, model: Model, tokens: int, scheme: str, team_size: int | None = None, placement: str | None = None
) -> StepEstimate:
    """Return a training step of the paper: one sequence, all ranks in one context-parallel group."""
    job = _attention(cluster, model, tokens)
    return estimate_step(
        model, Choice(job, _plan(job, scheme, team_size, placement)), cluster, parallel_sizes(cluster), PROGRAM
    )


def _attention(cluster: Cluster, model: Model, tokens: int) -> AttentionJob:
    return attention_job(model, cluster, tokens, parallel_sizes(cluster), PROGRAM, causal=CAUSAL)


def _plan(job: AttentionJob, scheme: str, team_size: int | None, placement: str | None) -> Plan:
    """Return a plan with one head group, because the paper does not pipeline heads."""
    heads = {"q_heads": job.shape.q_heads, "kv_heads": job.shape.kv_heads}
    return make_plan(scheme, job.cp_size, team_size=team_size, placement=placement, head_groups=1, **heads)


def summary(cases: Iterable[Case]) -> Summary:
    """Return how well predictions agree with published results."""
    cases = list(cases)
    with_sizes = [case for case in cases if len(case.paper) > 2]
    compared = [(case, name) for case in cases for name in case.paper if name != "ring"]
    pairs = [(case.gain(name, paper=True), case.gain(name, paper=False)) for case, name in compared]
    errors = [case.ours[name] / rate - 1 for case in cases for name, rate in case.paper.items()]
    return Summary(
        best_right=sum(case.best_is_right for case in with_sizes),
        cases=len(with_sizes),
        signs_right=sum((paper > 0) == (ours > 0) for paper, ours in pairs),
        gains=len(pairs),
        error_points=sum(abs(paper - ours) for paper, ours in pairs) / len(pairs),
        throughput_error=100 * sum(map(abs, errors)) / len(errors),
    )


@dataclass(frozen=True)
class PlannerGrid:
    """The planner's grid in place of the paper's best. Times are of one attention layer, both passes.

    Attributes:
        case: case of figure 7.
        paper_scheme: paper's best scheme, as predicted.
        choice: planner's choice.
        paper_s, ours_s: seconds of both with the paper's program.
        paper_overlapped_s, ours_overlapped_s: seconds of both with all overlap that streams allow.
        paper_k_tokens_s, ours_k_tokens_s: throughput of whole steps with the paper's program, 1000 tokens per second.
        paper_nic_gb, ours_nic_gb: 1e9 bytes through the busiest NIC in one direction.
    """

    case: Case
    paper_scheme: str
    choice: Choice
    paper_s: float
    ours_s: float
    paper_overlapped_s: float
    ours_overlapped_s: float
    paper_k_tokens_s: float
    ours_k_tokens_s: float
    paper_nic_gb: float
    ours_nic_gb: float

    @property
    def reason(self) -> str:
        """One line: the limit of the choice, its distance from that limit, and the traffic of the busiest NIC."""
        bound = self.choice.bound
        return (
            f"bound by {bound.resource}, {self.ours_overlapped_s / bound.seconds:.2f} of the bound; "
            f"{self.ours_nic_gb:.2f} GB through a NIC instead of {self.paper_nic_gb:.2f}"
        )


def planner_grid(case: Case) -> PlannerGrid:
    """Return the planner's grid for a case of figure 7."""
    job = _attention(case.cluster, case.model, case.tokens)
    seconds = {choice: simulated_attention(choice, PROGRAM).seconds for choice in search(job).best[:SHORTLIST]}
    choice = min(seconds, key=seconds.__getitem__)
    scheme = max(case.placements, key=case.ours.__getitem__)
    plan = _plan(job, "wallfacer", int(scheme.removeprefix("wallfacer-")), case.placements[scheme])
    paper = Choice(job, plan)
    whole = estimate_step(case.model, choice, case.cluster, parallel_sizes(case.cluster), PROGRAM)
    return PlannerGrid(
        case=case,
        paper_scheme=scheme,
        choice=choice,
        paper_s=simulated_attention(paper, PROGRAM).seconds,
        ours_s=seconds[choice],
        paper_overlapped_s=paper.simulation.seconds,
        ours_overlapped_s=choice.simulation.seconds,
        paper_k_tokens_s=case.ours[scheme],
        ours_k_tokens_s=whole.tokens_s / 1e3,
        paper_nic_gb=_busiest_nic_gb(paper),
        ours_nic_gb=_busiest_nic_gb(choice),
    )


def _busiest_nic_gb(choice: Choice) -> float:
    """Return 1e9 bytes. All ranks are simulated: with symmetry one simulated NIC represents several."""
    symmetry = Symmetry(choice.plan.grid, (1,), every_rank=True)
    result = simulate(choice.job.costs, choice.schedules, symmetry)
    return max(size for link, size in result.link_bytes.items() if link.kind == "nic") / 1e9
