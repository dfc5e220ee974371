"""Find the rank that blocks other ranks, given the states of all ranks, and describe the chain of waits."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass

from megatron_wallfacer.engine.waits.progress import Label, layer_text


@dataclass(frozen=True)
class State:
    """The published state of a rank.

    Attributes:
        beat: number of heartbeats so far. A rank whose ``beat`` stops growing is stopped or dead.
        passes: number of attention passes that the rank has begun.
        layer: number or name of the layer of the last pass; None outside a model.
        label: messages that the rank waits for; None if the rank waits for no message of attention.
        seconds: duration of the wait in seconds.
        place: line of code that the main thread runs.
    """

    rank: int
    host: str
    beat: int = 0
    passes: int = 0
    layer: int | str | None = None
    backward: bool = False
    label: Label | None = None
    seconds: float = 0.0
    place: str = ""

    def to_text(self) -> str:
        """Return the state as JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def from_text(cls, text: str) -> State:
        """Return the state that the JSON text of :meth:`to_text` describes."""
        values = json.loads(text)
        if values["label"] is not None:
            tensors, peers, axis, sends = values["label"]
            values["label"] = Label(tuple(tensors), tuple(peers), axis, sends)
        return cls(**values)

    @property
    def where(self) -> str:
        """Return layer and pass as a phrase for messages."""
        if not self.passes:
            return "before its first call of attention"
        layer = "" if self.layer is None else f"{layer_text(self.layer)} "
        return f"{layer}{'backward' if self.backward else 'forward'}"


@dataclass(frozen=True)
class Seen:
    """The last published state of a rank.

    ``silent`` is the age of the state in seconds, if the rank should have published a newer state; else None.
    """

    state: State
    silent: float | None = None


def wait_line(state: State) -> str:
    """Return a line about a wait: ``rank 3, layer 12 backward: no dK, dV from rank 2 (ring_outer) for 60 s``."""
    label = state.label
    if label is None:
        return f"rank {state.rank}, {state.where}: waits for no message of attention, at {state.place}"
    tensors, peers = ", ".join(label.tensors), _ranks(label.peers)
    missing = f"{tensors} to {peers} not received there" if label.sends else f"no {tensors} from {peers}"
    return f"rank {state.rank}, {state.where}: {missing} ({label.axis}) for {state.seconds:.0f} s"


def chain_line(state: State, read: Callable[[int], Seen | None]) -> str | None:
    """Return a line of text about the chain of waiting ranks, up to the rank that blocks them; None without a wait.

    ``state`` is the state of the rank that waits. ``read`` returns the last state of a rank, or None.
    """
    if state.label is None:
        return None
    path, end = [state], None
    while end is None:
        label = path[-1].label
        assert label is not None
        rank, seen = _slowest([(peer, read(peer)) for peer in label.peers])
        if rank in [one.rank for one in path]:
            end = _circle(path[[one.rank for one in path].index(rank) :])
        elif seen is None:
            end = f"rank {rank}, which has published nothing: it has not reached attention, or is dead"
        elif seen.silent is not None:
            end = (
                f"rank {rank} on {seen.state.host}, which has given no sign of life for {seen.silent:.0f} s: stopped, "
                f"dead or cut off; last seen in {seen.state.where}, at {seen.state.place}"
            )
        elif seen.state.label is None:
            end = _busy(seen.state, state)
        else:
            path.append(seen.state)
    between = "".join(f"rank {one.rank} ({one.where}), which waits for " for one in path[1:])
    return f"rank {state.rank} waits for {between}{end}"


def _slowest(peers: list[tuple[int, Seen | None]]) -> tuple[int, Seen | None]:
    """Return the rank that most likely blocks the others, with its state.

    First come ranks that publish no state, then ranks that do not wait, then the rank with the fewest passes.
    """

    def order(peer: tuple[int, Seen | None]) -> tuple[int, int]:
        seen = peer[1]
        if seen is None or seen.silent is not None:
            return 0, 0
        return (1 if seen.state.label is None else 2), seen.state.passes

    return min(peers, key=order)


def _busy(state: State, waiting: State) -> str:
    earlier = "an earlier pass, " if state.passes < waiting.passes else ""
    passes = f"pass {state.passes}, rank {waiting.rank} is in pass {waiting.passes}"
    return (
        f"rank {state.rank} on {state.host}, which waits for no message of attention: "
        f"{earlier}{state.where} ({passes}), at {state.place}"
    )


def _circle(ranks: list[State]) -> str:
    first = min(ranks, key=lambda state: state.passes)
    listed = ", ".join(f"rank {state.rank} on {state.host} in pass {state.passes} ({state.where})" for state in ranks)
    earliest = f": the earliest is rank {first.rank}" if len({state.passes for state in ranks}) > 1 else ""
    return f"rank {ranks[0].rank}, a circle of ranks that wait for each other{earliest}: {listed}"


def _ranks(ranks: tuple[int, ...]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
