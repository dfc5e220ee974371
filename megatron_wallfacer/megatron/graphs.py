"""Run attention in CUDA graphs, and check that a CUDA graph can contain its communication."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from megatron_wallfacer.engine.foreign import ForeignCaptures, foreign_captures
from megatron_wallfacer.engine.graphed import Graphs, graphs_of
from megatron_wallfacer.engine.groups import AxisGroups
from megatron_wallfacer.engine.loaded_nccl import loaded_nccl
from megatron_wallfacer.engine.transfers import Transfers
from megatron_wallfacer.errors import WallfacerError
from megatron_wallfacer.megatron.flags import flag_name
from megatron_wallfacer.megatron.megatron_graphs import free_graphs

if TYPE_CHECKING:
    from megatron_wallfacer.megatron.settings import Settings

FLAG = flag_name("cuda_graphs")
#: Older releases of NCCL can hang when a graph with messages between nodes is replayed.
_NCCL_ACROSS_NODES = (2, 30, 4)
#: Values of an environment variable that torch reads as off.
_OFF = ("", "0", "f", "false", "n", "no")


def runner_of(settings: Settings, transfers: Transfers) -> Graphs | ForeignCaptures | None:
    """Return the object that runs attention in the plugin's or Megatron's CUDA graphs, or None without CUDA graphs."""
    if settings.flags.cuda_graphs:
        return graphs_of(transfers, free_graphs)
    return None if settings.megatron_graphs is None else foreign_captures(transfers, free_graphs)


def check_graphs(groups: AxisGroups, environment: Mapping[str, str], flag: str = FLAG) -> None:
    """Raise a WallfacerError if the backend, the environment or the NCCL version forbids communication in CUDA graphs.

    ``flag`` is the flag, as typed, that puts attention into CUDA graphs.
    """
    if groups.backend != "nccl":
        raise WallfacerError(
            f"{flag}: must be left out where the backend is {groups.backend}: a CUDA graph can contain NCCL only"
        )
    for name in ("TORCH_NCCL_BLOCKING_WAIT", "NCCL_BLOCKING_WAIT"):
        if environment.get(name, "").lower() not in _OFF:
            raise WallfacerError(
                f"{name}={environment[name]}: must be unset or 0 with {flag}, because a capture must not block the host"
            )
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        growing = "expandable_segments:True" in environment.get(name, "")
        if growing and environment.get("NCCL_GRAPH_REGISTER") != "0":
            raise WallfacerError(
                f"{name}={environment[name]}: needs NCCL_GRAPH_REGISTER=0 with {flag}, "
                "because NCCL must not register memory that moves"
            )
    nccl = loaded_nccl() if len(set(groups.hosts)) > 1 else None
    if nccl is not None and nccl < _NCCL_ACROSS_NODES:
        raise WallfacerError(
            f"NCCL {'.'.join(map(str, nccl))}: must be {'.'.join(map(str, _NCCL_ACROSS_NODES))} or later with "
            f"{flag} on several nodes, because replays can hang with older releases"
        )
