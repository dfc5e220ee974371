"""The paper's figures 7 and 9 again: ring and WallFacer, and what the planner would have chosen, on its clusters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType

from megatron_wallfacer.errors import OptionError
from megatron_wallfacer.planning.cluster import Cluster
from megatron_wallfacer.planning.layer import Step, attention_job, attention_seconds, step
from megatron_wallfacer.planning.model import Model
from megatron_wallfacer.planning.paper import CAUSAL, PLACEMENT, SOFTWARE, Point, published
from megatron_wallfacer.planning.parallel import Software, spread_over
from megatron_wallfacer.planning.play import play
from megatron_wallfacer.planning.search import Choice, Job, search
from megatron_wallfacer.planning.symmetry import Symmetry
from megatron_wallfacer.schedule.plan import Plan
from megatron_wallfacer.schedule.schemes import make_plan

PLACEMENTS = ("teams-adjacent", "rings-adjacent")
#: Team sizes of figure 7, and of figure 9, whose text names none.
SIZES = {7: (2, 4), 9: (2, 4, 8)}
#: Throughputs nearer than this are a tie.
TIE = 0.03
#: Of the plans that a search finds, so many are compared again with the paper's software.
SHORTLIST = 8
#: Which placement a bar of figure 7 has is not said. ``each``: the better one for each C; ``cluster``: one for all bars
#: of a cluster, since the search is said to run once for a cluster; or one of the two everywhere.
READINGS: Mapping[str, Callable[[Cluster], tuple[str, ...]]] = MappingProxyType(
    {
        "each": lambda cluster: PLACEMENTS,
        "cluster": lambda cluster: (PLACEMENT[cluster.name],),
        "teams-adjacent": lambda cluster: ("teams-adjacent",),
        "rings-adjacent": lambda cluster: ("rings-adjacent",),
    }
)


@dataclass(frozen=True)
class Case:
    """One cluster, model and length: several points of a figure.

    Attributes:
        figure: 7 or 9.
        cluster, model, tokens: of it.
        paper: 1000 tokens a second by scheme.
        ours: what is predicted, by the same names; WallFacer's at the best placement of each C.
        placements: by name, the best.
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
        """As in the tables."""
        return f"{self.cluster.name} {self.cluster.ranks:>2} {self.model.name} {self.tokens // 1024}K"

    def gain(self, scheme: str, *, paper: bool) -> float:
        """Over the ring, in percent."""
        rates = self.paper if paper else self.ours
        return 100 * (rates[scheme] / rates["ring"] - 1)

    @property
    def best_is_right(self) -> bool:
        """Whether the C that is predicted to be best is the paper's, or ties with it there or here."""
        names, enough = [name for name in self.paper if name != "ring"], 1 - TIE
        ours, paper = (max(names, key=rates.__getitem__) for rates in (self.ours, self.paper))
        return self.paper[ours] >= enough * self.paper[paper] or self.ours[paper] >= enough * self.ours[ours]


@dataclass(frozen=True)
class Summary:
    """Of the cases of a figure.

    Attributes:
        best_right: cases whose best C comes out.
        cases: of those that name one; figure 9 has the best alone.
        signs_right: gains with the sign of the paper's.
        gains: of all.
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


def replay(figure: int, reading: str = "each") -> list[Case]:
    """Every case of a figure, played.

    Args:
        figure: 7 or 9.
        reading: one of :data:`READINGS`.

    Raises:
        OptionError: another figure, or another reading.
    """
    if figure not in SIZES:
        raise OptionError("figure", figure, "7 or 9")
    if reading not in READINGS:
        raise OptionError("reading", reading, f"one of {', '.join(READINGS)}")
    groups: dict[tuple, list[Point]] = {}
    for point in published(figure):
        groups.setdefault((point.cluster, point.model, point.tokens), []).append(point)
    return [_case(figure, points, READINGS[reading](points[0].cluster)) for points in groups.values()]


def summary(cases: Iterable[Case]) -> Summary:
    """How near they come."""
    cases = list(cases)
    told = [case for case in cases if len(case.paper) > 2]
    pairs = [(case.gain(name, paper=True), case.gain(name, paper=False)) for case, name in _compared(cases)]
    rates = [case.ours[name] / rate - 1 for case in cases for name, rate in case.paper.items()]
    return Summary(
        best_right=sum(case.best_is_right for case in told),
        cases=len(told),
        signs_right=sum((paper > 0) == (ours > 0) for paper, ours in pairs),
        gains=len(pairs),
        error_points=sum(abs(paper - ours) for paper, ours in pairs) / len(pairs),
        throughput_error=100 * sum(map(abs, rates)) / len(rates),
    )


@dataclass(frozen=True)
class Better:
    """What the planner chooses where the paper ran WallFacer; times are of one attention layer, both passes.

    Attributes:
        case: which.
        paper_scheme: the paper's best, as predicted.
        choice: the planner's.
        paper_s, ours_s: of both, with the paper's software.
        paper_overlapped_s, ours_overlapped_s: of both, with software that hides what can be hidden.
        paper_k_tokens_s, ours_k_tokens_s: of whole steps, with the paper's software.
        paper_card_gb, ours_card_gb: 1e9 bytes that the busiest network card carries in one direction.
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
    paper_card_gb: float
    ours_card_gb: float

    @property
    def reason(self) -> str:
        """One line: what limits the choice, how near to that it is, and what the busiest card carries."""
        bound = self.choice.bound
        return (
            f"bound by {bound.by}, {self.ours_overlapped_s / bound.seconds:.2f} of the bound; "
            f"{self.ours_card_gb:.2f} GB through a card instead of {self.paper_card_gb:.2f}"
        )


def better(case: Case) -> Better:
    """The planner's grid for a case of figure 7."""
    spread = spread_over(case.cluster)
    job = attention_job(case.model, case.cluster, case.tokens, spread, causal=CAUSAL, software=SOFTWARE)
    found = {choice: attention_seconds(choice, SOFTWARE)[0] for choice in search(job).best[:SHORTLIST]}
    choice = min(found, key=found.__getitem__)
    scheme = max(case.placements, key=case.ours.__getitem__)
    plan = _plan(job, "wallfacer", int(scheme.removeprefix("wallfacer-")), case.placements[scheme])
    rival = Choice(job, plan)
    return Better(
        case=case,
        paper_scheme=scheme,
        choice=choice,
        paper_s=attention_seconds(rival, SOFTWARE)[0],
        ours_s=found[choice],
        paper_overlapped_s=rival.played.seconds,
        ours_overlapped_s=choice.played.seconds,
        paper_k_tokens_s=case.ours[scheme],
        ours_k_tokens_s=step(case.model, choice, case.cluster, spread, SOFTWARE).tokens_s / 1e3,
        paper_card_gb=_card_gb(rival),
        ours_card_gb=_card_gb(choice),
    )


def _card_gb(choice: Choice) -> float:
    """Counted with every rank played, since links of a folded play stand for several."""
    symmetry = Symmetry(choice.plan.grid, (1,), folded=False)
    played = play(choice.job.costs, choice.schedules, symmetry)
    return max(size for link, size in played.link_bytes.items() if link.kind == "nic") / 1e9


def _compared(cases: Iterable[Case]) -> list[tuple[Case, str]]:
    return [(case, name) for case in cases for name in case.paper if name != "ring"]


def _case(figure: int, points: Sequence[Point], placements: tuple[str, ...]) -> Case:
    first = points[0]
    setting = first.cluster, first.model, first.tokens
    ours, placed = {"ring": throughput(*setting, "ring").tokens_s / 1e3}, {}
    for size in SIZES[figure]:
        if first.cluster.ranks % (size * size):
            continue
        rates = {way: throughput(*setting, "wallfacer", size, way).tokens_s / 1e3 for way in placements}
        placed[f"wallfacer-{size}"] = max(rates, key=rates.__getitem__)
        ours[f"wallfacer-{size}"] = max(rates.values())
    if figure == 9:
        best = max(placed, key=ours.__getitem__)
        ours, placed = (
            {"ring": ours["ring"], "wallfacer-best": ours[best]},
            {"wallfacer-best": f"{best} {placed[best]}"},
        )
    return Case(figure, *setting, {point.scheme: point.k_tokens_s for point in points}, ours, placed)


@cache
def throughput(
    cluster: Cluster,
    model: Model,
    tokens: int,
    scheme: str,
    team_size: int | None = None,
    placement: str | None = None,
    software: Software = SOFTWARE,
) -> Step:
    """A step of the paper's kind: all ranks in one context-parallel group, one sequence."""
    spread = spread_over(cluster)
    job = attention_job(model, cluster, tokens, spread, causal=CAUSAL, software=software)
    return step(model, Choice(job, _plan(job, scheme, team_size, placement)), cluster, spread, software)


def _plan(job: Job, scheme: str, team_size: int | None, placement: str | None) -> Plan:
    """The paper pipelines no heads."""
    heads = {"q_heads": job.shape.q_heads, "kv_heads": job.shape.kv_heads}
    return make_plan(scheme, job.cp_size, team_size=team_size, placement=placement, head_groups=1, **heads)
