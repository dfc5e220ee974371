"""Schemes by name: each is a corner of the grid.

=============  ======================================================  ==========================
name           grid                                                    source
=============  ======================================================  ==========================
``ring``       ring = P                                                Ring Attention, Megatron p2p
``all-gather`` kv_team = P                                             Llama 3, LSS forward
``team-ring``  team = C, ring = P / C, no K/V gather                    ``docs/design.md``
``wallfacer``  team = kv_team = C, ring = P / C^2, paper's permutation  arXiv 2407.00611
=============  ======================================================  ==========================

``auto`` is the ``team-ring`` whose C moves the fewest words, until a planner chooses.
"""

from __future__ import annotations

from math import isqrt

from megatron_wallfacer.errors import OptionError
from megatron_wallfacer.schedule.grid import RINGS_ADJACENT, TEAMS_ADJACENT, Grid
from megatron_wallfacer.schedule.plan import Plan, Rider

SCHEMES: tuple[str, ...] = ("auto", "wallfacer", "team-ring", "ring", "all-gather")
NOT_BUILT_YET: tuple[str, ...] = ("double-ring", "ulysses", "usp", "loongtrain", "mesh", "lss", "tokenring", "burst")
PLACEMENTS: dict[str, tuple[str, ...]] = {"teams-adjacent": TEAMS_ADJACENT, "rings-adjacent": RINGS_ADJACENT}


def make_plan(
    scheme: str,
    cp_size: int,
    *,
    team_size: int | None = None,
    kv_team_size: int | None = None,
    placement: str | tuple[str, ...] | None = None,
    backward: str = "auto",
    kappa: float = 1.0,
) -> Plan:
    """The plan for a scheme by name.

    Args:
        scheme: one of :data:`SCHEMES`.
        cp_size: P.
        team_size: C, where the scheme leaves it open; chosen by words if not given.
        kv_team_size: G by hand, with ``team-ring`` or ``auto``.
        placement: ``teams-adjacent`` (default), ``rings-adjacent``, or an order of the axes, fastest first.
        backward: ``auto``, ``kv`` or ``q``.
        kappa: kv heads / q heads, for the choice of C.

    Raises:
        OptionError: naming the option, its value and what is allowed.
    """
    if cp_size < 1:
        raise OptionError("cp_size", cp_size, "a positive number of ranks")
    if scheme in NOT_BUILT_YET:
        raise OptionError("scheme", scheme, f"one of {', '.join(SCHEMES)}; {scheme} is not built yet")
    if scheme not in SCHEMES:
        raise OptionError("scheme", scheme, f"one of {', '.join(SCHEMES)}")
    team, kv_team = _axes(scheme, cp_size, team_size, kv_team_size, kappa)
    grid = Grid(team, kv_team, cp_size // (team * kv_team), _placement(placement))
    published = scheme == "wallfacer"
    return Plan(
        grid=grid,
        scheme="team-ring" if scheme == "auto" else scheme,
        kv_order="paper" if published else "native",
        backward=_backward(backward, default="q" if published else "kv"),
    )


def team_ring_words(cp_size: int, team: int, kappa: float) -> float:
    """Words received by a rank, forward + backward, in units of n*H (``docs/design.md``).

    Forward: Q and partial O along the team, K and V around the ring. Backward, with K, V riding: Q, dO and
    dQ along the team; K, V, dK, dV around the ring.
    """
    return 5 * (team - 1) + 6 * kappa * (cp_size / team - 1)


def published_words(cp_size: int, team: int, kappa: float) -> float:
    """Words received by a rank under the published scheme, forward + backward, in units of n*H.

    Equations 4 to 7 of the paper with kv heads counted (gathers and combine, permutation and ring), and
    its backward, which the paper gives in prose: K, V stay; Q, dO, dQ ride and go home.
    """
    # A team of one has no copies to spread: no permutation, and with one rank no way home either.
    entry = team if team > 1 else 0
    home = team if cp_size > 1 else 0
    ring = cp_size / team - team
    forward = (2 + 2 * kappa) * (team - 1) + 2 * kappa * (entry + ring)
    return forward + (3 + 4 * kappa) * (team - 1) + 2 * (entry + ring) + home + ring


def divisors(number: int) -> tuple[int, ...]:
    """All divisors, ascending."""
    small = [d for d in range(1, isqrt(number) + 1) if number % d == 0]
    return (*small, *(number // d for d in reversed(small) if d * d != number))


def _axes(scheme: str, cp_size: int, team: int | None, kv_team: int | None, kappa: float) -> tuple[int, int]:
    if scheme in ("ring", "all-gather"):
        fixed = {"team_size": (team, 1), "kv_team_size": (kv_team, cp_size if scheme == "all-gather" else 1)}
        for option, (given, must) in fixed.items():
            if given not in (None, must):
                raise OptionError(option, given, f"{must} with scheme {scheme}")
        return 1, fixed["kv_team_size"][1]
    if scheme == "wallfacer":
        return _published_axes(cp_size, team, kv_team, kappa)
    kv_team = _divisor("kv_team_size", 1 if kv_team is None else kv_team, cp_size)
    if team is None:
        team = min(divisors(cp_size // kv_team), key=lambda c: (team_ring_words(cp_size, c, kappa), c))
    _divisor("team_size", team, cp_size)
    if cp_size % (team * kv_team):
        raise OptionError(
            "kv_team_size",
            kv_team,
            f"a divisor of {cp_size // team}: team {team} x kv_team x ring must be cp size {cp_size}",
        )
    return team, kv_team


def _published_axes(cp_size: int, team: int | None, kv_team: int | None, kappa: float) -> tuple[int, int]:
    legal = [c for c in divisors(cp_size) if cp_size % (c * c) == 0]
    if team is None:
        team = min(legal, key=lambda c: (published_words(cp_size, c, kappa), c))
    if team not in legal:
        raise OptionError(
            "team_size",
            team,
            f"one of {', '.join(map(str, legal))}: scheme wallfacer needs C^2 to divide cp size {cp_size}",
        )
    if kv_team not in (None, team):
        raise OptionError("kv_team_size", kv_team, f"{team}: scheme wallfacer has team = kv_team")
    return team, team


def _divisor(option: str, value: int, cp_size: int) -> int:
    if value < 1 or cp_size % value:
        raise OptionError(option, value, f"a divisor of cp size {cp_size}: {', '.join(map(str, divisors(cp_size)))}")
    return value


def _placement(placement: str | tuple[str, ...] | None) -> tuple[str, ...]:
    if placement is None:
        return TEAMS_ADJACENT
    if isinstance(placement, str):
        return PLACEMENTS.get(placement) or tuple(placement.split(","))
    return placement


def _backward(backward: str, *, default: Rider) -> Rider:
    if backward not in ("auto", "kv", "q"):
        raise OptionError("backward", backward, "auto, kv or q")
    return default if backward == "auto" else backward  # type: ignore[return-value]
