"""Trains each combination with the plugin and at context-parallel size 1, and says by how much they differ.

fp32: the losses of all iterations, and those of evaluation, differ by at most `LOSS_TOLERANCE`.

bf16: rounding alone makes a difference that grows from step to step, and how much depends on the model. So the same
training is run in other orders of reduction. `SPREADS` times the largest difference that they make is allowed: it is
the range of a few draws, and another draw may well lie outside. Orders are:

* At size 1 without the plugin, where Megatron's attention takes its keys, its embedding the places of a word, and its
  linear layers the tokens of a weight's gradient in other orders, by `ORDERS` seeds (`tests.composition.pretrain`). The
  largest difference between any two.
* With experts also at the combination's own size, where the ranks add up by up to four *other* schemes: where a router
  decides, splitting the tokens of a gradient over ranks moves more than any order of them does. The largest difference
  between any two. What is judged is none of them, so that nothing widens its own limit. The same where Megatron's own
  attention cannot train it, and there is no other order of keys.

Mixture of experts: which experts a token gets is a step function. Where the last that is chosen is before the first
that is not by less than what rounding makes, two runs part for a reason that is in neither of them. So the seed of the
weights is the first of `SEEDS` at which the run of size 1 keeps `GAP` of distance everywhere, else the one with most.
With some seeds a step enlarges rounding a hundredfold. So in fp32 the other orders of size 1 without the plugin must
also stay within a `STEADY` of both tolerances; a seed with which one does not counts as one without distance.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from itertools import combinations
from pathlib import Path

from tests.composition.combination import Combination, Run
from tests.composition.data import data_flags
from tests.composition.features import SPACE
from tests.megatron.training import GRAD_NORM_TOLERANCE, LOSS_TOLERANCE, largest_differences
from tests.support.megatron_runs import RunResult, train

SCRIPT = Path(__file__).with_name("pretrain.py")
LOGS = Path(__file__).resolve().parents[2] / "runs" / "composition"
TIMEOUT_S = 900.0
ORDERS = 3
SPREADS = 2.0
#: The first `SIBLINGS` that fit, and are not what is judged, are run beside it in bf16.
OTHER_SCHEMES = ("ulysses", "team-ring", "ring", "mesh", "tokenring", "all-gather")
SIBLINGS = 4
SEEDS = range(1234, 1242)
GAP = 2e-6
STEADY = 0.25

_GAP_LINE = re.compile(r"^composition: smallest gap in routing (\S+)$", re.MULTILINE)
_ERROR = re.compile(r"(\[rank\d+\]: )?([\w.]*(Error|Exception)|wallfacer: error)\b")
_VALIDATION = re.compile(r"validation loss at iteration \d+ .*?lm loss value: (\S+)")


@dataclass(frozen=True)
class Outcome:
    """One line of the table.

    Attributes:
        number, ranks, dtype, cp_size, scheme, features: of the combination.
        loss: largest relative difference of the losses, training and evaluation.
        grad_norm: of the gradient norms.
        allowed: of the losses; None where the runs did not get that far.
        verdict: `ok`, or what is wrong, in one line.
        seconds: of all runs that were made for it.
    """

    number: int
    ranks: int
    dtype: str
    cp_size: int
    scheme: str
    features: str
    loss: float | None
    grad_norm: float | None
    allowed: float | None
    verdict: str
    seconds: float

    @property
    def good(self) -> bool:
        return self.verdict == "ok"

    def as_json(self) -> dict[str, object]:
        return asdict(self)


def run_combination(combination: Combination, iterations: int) -> Outcome:
    """Make all runs of one combination and judge it. Never raises for what a run did."""
    before = _spent[0]
    loss = grad_norm = allowed = None
    try:
        seed = _seed(combination, iterations)
        split = _train(combination.split, iterations, seed)
        if combination.dtype == "bf16":
            whole = _in_every_order(combination.whole, iterations, seed)
            spread = max(_differences(one, other)[0] for one, other in combinations(whole, 2))
            if combination.row["experts"] != "dense" or not combination.megatron_can:
                spread = max(spread, _between_schemes(combination, iterations, seed))
            allowed = SPREADS * spread
        else:
            whole, allowed = [_train(combination.whole, iterations, seed)], LOSS_TOLERANCE
        loss, grad_norm = min(_differences(split, one) for one in whole)
        verdict = _verdict(combination.dtype, loss, grad_norm, allowed)
    except AssertionError as error:
        verdict = f"failed: {_reason(str(error))}; log: {_kept(combination.number, str(error))}"
    return Outcome(
        number=combination.number,
        ranks=combination.split.ranks,
        dtype=combination.dtype,
        cp_size=combination.cp_size,
        scheme=combination.scheme,
        features=str(combination),
        loss=loss,
        grad_norm=grad_norm,
        allowed=allowed,
        verdict=verdict,
        seconds=_spent[0] - before,
    )


def _verdict(dtype: str, loss: float, grad_norm: float, allowed: float) -> str:
    # Written so that a nan is wrong.
    if not loss <= allowed:
        return f"loss differs by {loss:.1e}, allowed {allowed:.1e}"
    if dtype == "fp32" and not grad_norm <= GRAD_NORM_TOLERANCE:
        return f"gradient norm differs by {grad_norm:.1e}, allowed {GRAD_NORM_TOLERANCE:.1e}"
    return "ok"


def _differences(run: RunResult, reference: RunResult) -> tuple[float, float]:
    """Largest relative difference (losses, gradient norms), those of evaluation among them.

    Raises:
        AssertionError: they did not evaluate at the same iterations.
    """
    loss, grad_norm = largest_differences(run, reference)
    got, want = _validation(run), _validation(reference)
    assert len(got) == len(want), f"{len(got)} evaluations, and {len(want)} at context-parallel size 1"
    return max([loss, *(abs(a - b) / b for a, b in zip(got, want, strict=True))]), grad_norm


def _validation(run: RunResult) -> list[float]:
    """Losses of evaluation, as the last rank printed them: seven digits."""
    return [float(value) for value in _VALIDATION.findall(run.ranks[-1].output)]


def _in_every_order(whole: Run, iterations: int, seed: int) -> list[RunResult]:
    """Context-parallel size 1 with the terms of its sums in several orders; Megatron's own first."""
    orders = (None, *map(str, range(1, ORDERS + 1)))
    return [_train(whole, iterations, seed, order) for order in orders]


def _between_schemes(combination: Combination, iterations: int, seed: int) -> float:
    """By how much other schemes of the same size differ from each other at most."""
    runs = [_train(sibling.split, iterations, seed) for sibling in siblings(combination)]
    return max(_differences(one, other)[0] for one, other in combinations(runs, 2))


def siblings(combination: Combination) -> list[Combination]:
    """The same by other schemes that add up in different orders."""
    rows = [combination.row | {"scheme": name} for name in OTHER_SCHEMES if name != combination.scheme]
    fitting = [row for row in rows if SPACE.broken(row, "scheme") is None]
    return [Combination(combination.number, row) for row in fitting[:SIBLINGS]]


def _seed(combination: Combination, iterations: int) -> int:
    """The seed of the weights."""
    if combination.row["experts"] == "dense" or combination.dtype == "bf16":
        return SEEDS[0]
    return first_far_enough(SEEDS, lambda seed: _distance(combination.whole, iterations, seed))


def _distance(whole: Run, iterations: int, seed: int) -> float:
    """The smallest gap in routing; 0 where the order of sums alone moves the losses or the gradient norms."""
    own = _train(whole, iterations, seed)
    # One order may by chance move little: all are tried, until one moves too much.
    others = (_train(whole, iterations, seed, str(order)) for order in range(1, ORDERS + 1))
    return smallest_gap(own) if all(is_steady(*_differences(other, own)) for other in others) else 0.0


def is_steady(loss: float, grad_norm: float) -> bool:
    """Whether differences without the plugin leave room below the tolerances."""
    return loss <= STEADY * LOSS_TOLERANCE and grad_norm <= STEADY * GRAD_NORM_TOLERANCE


def first_far_enough(seeds: Sequence[int], gap_of: Callable[[int], float]) -> int:
    """The first seed with `GAP`, else the one with most."""
    gaps: dict[int, float] = {}
    for seed in seeds:
        gaps[seed] = gap_of(seed)
        if gaps[seed] >= GAP:
            break
    return max(gaps, key=gaps.__getitem__)


def smallest_gap(run: RunResult) -> float:
    """Over all tokens, layers and ranks."""
    return min(float(gap) for gap in _GAP_LINE.findall(run.output))


_spent = [0.0]


@cache
def _train(run: Run, iterations: int, seed: int, order: str | None = None) -> RunResult:
    """One run, whole and well ended.

    Raises:
        AssertionError: it was not.
    """
    environment = {} if order is None else {"COMPOSITION_ORDER": order}
    argv = [*run.flags, *data_flags(run.documents), "--seed", str(seed), "--train-iters", str(iterations)]
    result = train(run.ranks, argv, script=SCRIPT, timeout_s=TIMEOUT_S, env=environment)
    _spent[0] += result.seconds
    result.check()
    assert len(result.iterations) == iterations, f"{len(result.iterations)} of {iterations} iterations"
    return result


def _kept(number: int, text: str) -> Path:
    """The file that keeps the last lines of each rank that failed, the first to fail first."""
    LOGS.mkdir(parents=True, exist_ok=True)
    log = LOGS / f"{number}.log"
    log.write_text(text)
    return log


def _reason(text: str) -> str:
    """The error of the first rank that failed, in one line; `text` as `RunResult.check` words it."""
    first = text.partition("\n===== rank")[0]
    lines = [line.strip() for line in first.splitlines() if line.strip()]
    errors = [line for line in lines if _ERROR.match(line)]
    return (errors or lines or ["for no reason given"])[-1]
