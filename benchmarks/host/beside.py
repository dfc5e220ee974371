"""Peers beside this project's schemes: the host time of ring-flash-attention's zig-zag ring and of yunchang's Ulysses.

Attention is an empty function for all, and messages go nowhere. Merges, sums and copies of the peers are operators of
PyTorch on tiny tensors. Ours take the path of a GPU: Triton's launch (:mod:`benchmarks.host.fake_triton`), with an
operator on a tiny tensor in place of what the driver does.
"""

from __future__ import annotations

import importlib
import inspect
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch

from benchmarks.host.clock import in_slices
from benchmarks.host.empty import EmptyKernel, Replay
from benchmarks.host.fake_triton import fake_device
from benchmarks.host.passes import HEAD_DIM, HEADS, TOKENS, Passes
from benchmarks.host.world import fake_world
from benchmarks.ours import Ours
from benchmarks.peers.loading import load
from benchmarks.peers.ring_flash import RingFlashAttention
from benchmarks.peers.usp import Usp
from megatron_wallfacer.errors import WallfacerError

SIZES = (2, 4, 8)
#: Whose time a scheme of ours must not exceed.
PEER_OF = {"ring": "ring-flash-attn", "auto": "ring-flash-attn", "ulysses": "yunchang"}
Peer = RingFlashAttention | Usp
PEERS: dict[str, Callable[[int], Peer]] = {
    "ring-flash-attn": lambda ranks: RingFlashAttention(),
    "yunchang": lambda ranks: Usp(ranks, 1),
}
_FUNCTIONS = ("_flash_attn_forward", "_flash_attn_backward")

Times = dict[str, tuple[float, float]]


def load_peers() -> None:
    """Import the peers.

    Raises:
        PeerMissing: a peer is not installed; with the command that installs it.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for package in ("ring_flash_attn", "yunchang"):
            load(package)


def beside(ranks: int, rounds: int) -> Times:
    """Forward and backward of the last rank, in slices, by peer or scheme of this project. All take turns."""
    tiny = torch.zeros(1)
    with fake_world(ranks - 1, ranks), fake_device(lambda *_: tiny.add_(1)), ExitStack() as stack:
        passes = {name: stack.enter_context(_peer(make(ranks))) for name, make in PEERS.items()}
        passes |= {scheme: _ours(scheme, ranks) for scheme in PEER_OF}
        runs = [run for one in passes.values() for run in (one.forward, one.backward)]
        for run in runs:
            run()
        times = iter(in_slices(runs, rounds))
        return {name: (next(times), next(times)) for name in passes}


def _ours(scheme: str, ranks: int) -> Passes:
    ours, kernel = Ours(scheme, ranks, HEADS, {"scheme": scheme, "tokens": TOKENS}), EmptyKernel()
    ours.prepare()
    attend = ours.bind(kernel, HEAD_DIM)
    passes = Passes(lambda q, k, v: attend(*(x.transpose(0, 1) for x in (q, k, v))).transpose(0, 1), (1, 2))
    _first(passes, (kernel.forward, kernel.backward))
    return passes


@contextmanager
def _peer(peer: Peer) -> Iterator[Passes]:
    """Passes of a peer, with empty functions where its modules have imported FlashAttention's."""
    peer.prepare()
    passes = Passes(peer.bind(EmptyKernel()), (1, 2))
    shim = importlib.import_module("flash_attn.flash_attn_interface")
    replays = {name: Replay(getattr(shim, name)) for name in _FUNCTIONS}
    modules = [module for name, module in sys.modules.items() if name.split(".")[0] == peer.package]
    with ExitStack() as stack:
        for name, replay in replays.items():
            for module in modules:
                if getattr(module, name, None) is getattr(shim, name):
                    stack.enter_context(mock.patch.object(module, name, _with_signature(replay, getattr(shim, name))))
        _first(passes, tuple(replays.values()))
        yield passes


def _first(passes: Passes, replays: tuple[Replay, ...]) -> None:
    """Run the first pass, whose results are those of all later ones."""
    passes.forward()
    passes.backward()
    for replay in replays:
        if not replay.calls:
            raise WallfacerError("attention was not called through the function that is replaced")
        replay.repeat()


def _with_signature(replay: Replay, function: Callable[..., Any]) -> Callable[..., Any]:
    """A plain function: peers read the parameters of what they call."""

    def call(*args: Any, **options: Any) -> Any:
        return replay(*args, **options)

    call.__signature__ = inspect.signature(function)
    return call


def not_slower(times: Times) -> bool:
    """Whether each scheme of this project takes at most the time of its peer, forward and backward."""
    return all(
        mine <= peers for name, peer in PEER_OF.items() for mine, peers in zip(times[name], times[peer], strict=True)
    )
