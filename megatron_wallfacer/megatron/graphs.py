"""CUDA graphs: which of Megatron's own need nothing of the plugin, and where the plugin can make its own."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence

from megatron_wallfacer.engine.groups import AxisGroups
from megatron_wallfacer.engine.loaded_nccl import loaded_nccl
from megatron_wallfacer.errors import WallfacerError

#: By implementation, modules of Megatron's graphs that hold no attention. With ``local`` a layer that has ``mlp`` or
#: ``moe`` among its modules is captured whole (``TransformerLayer.create_mcore_cudagraph_manager``).
_WITHOUT_ATTENTION = {
    "local": ("moe_router", "moe_preprocess"),
    "transformer_engine": ("mlp", "moe", "moe_router", "moe_preprocess"),
}
#: Module that Megatron 0.18 and later takes for the implementation of that name.
_WHOLE = "full_iteration"
#: Older releases of NCCL can hang when a graph with messages between nodes is replayed.
_NCCL_ACROSS_NODES = (2, 30, 4)
#: Values with which torch takes a variable for off.
_OFF = ("", "0", "f", "false", "n", "no")


def graphs_around_attention(args: argparse.Namespace, argv: Sequence[str]) -> str | None:
    """Return why Megatron's CUDA graphs are not supported, or None where they hold no attention or are off."""
    implementation, typed = _implementation(args)
    flag, modules = _modules(args)
    if implementation == "none" and _WHOLE not in modules:
        return None
    allowed = _WITHOUT_ATTENTION.get(implementation, ())
    why = "attention inside Megatron's graphs is not built"
    if not allowed or _WHOLE in modules:
        named = f"{flag} {' '.join(modules)}" if modules else typed
        return f"{named}: must be left out with --wallfacer-cp-size, {why}"
    if not modules:
        limited = f"limited by {flag} to {', '.join(allowed)}"
        return f"{typed}: must be left out with --wallfacer-cp-size, or {limited}: {why}"
    if set(modules) <= set(allowed):
        return None
    return f"{flag} {' '.join(modules)}: must be among {', '.join(allowed)} with {typed} and --wallfacer-cp-size, {why}"


def _implementation(args: argparse.Namespace) -> tuple[str, str]:
    """Megatron's implementation, and the flag that chose it, as typed."""
    if getattr(args, "enable_cuda_graph", False):
        return "local", "--enable-cuda-graph"
    if getattr(args, "external_cuda_graph", False):
        return "transformer_engine", "--external-cuda-graph"
    implementation = getattr(args, "cuda_graph_impl", "none")
    return implementation, f"--cuda-graph-impl {implementation}"


def _modules(args: argparse.Namespace) -> tuple[str, list[str]]:
    """The flag that limits graphs to modules, and the modules by name: --cuda-graph-scope until Megatron 0.18."""
    old = getattr(args, "cuda_graph_scope_deprecated", None) or getattr(args, "cuda_graph_scope", None)
    new = getattr(args, "cuda_graph_modules", None)
    flag = "--cuda-graph-scope" if old or new is None else "--cuda-graph-modules"
    # Enums, but for names that Megatron replaces later; one that means all modules is the same as none.
    names = [getattr(module, "name", module) for module in old or new or ()]
    return flag, [name for name in names if name != "full"]


def wants_graphs(args: argparse.Namespace) -> bool:
    """Return whether ``--wallfacer-cuda-graphs`` is given.

    Raises:
        WallfacerError: it stands with a flag under which no pass could be a graph.
    """
    if not args.wallfacer_cuda_graphs:
        return False
    if args.wallfacer_transfers == "staged":
        raise WallfacerError(
            "--wallfacer-cuda-graphs: must be left out with --wallfacer-transfers staged, the host copies messages"
        )
    if args.wallfacer_log_metrics:
        raise WallfacerError(
            "--wallfacer-cuda-graphs: must be left out with --wallfacer-log-metrics, which times each wait of each step"
        )
    return True


def check_graphs(groups: AxisGroups, environment: Mapping[str, str]) -> None:
    """Check that a CUDA graph can hold the messages of these groups.

    Args:
        groups: of this rank.
        environment: variables of the process.

    Raises:
        WallfacerError: it cannot.
    """
    if groups.backend != "nccl":
        raise WallfacerError(
            f"--wallfacer-cuda-graphs: must be left out where the backend is {groups.backend}, "
            "a CUDA graph holds messages of NCCL only"
        )
    for name in ("TORCH_NCCL_BLOCKING_WAIT", "NCCL_BLOCKING_WAIT"):
        if environment.get(name, "").lower() not in _OFF:
            raise WallfacerError(
                f"{name}={environment[name]}: must be unset or 0 with --wallfacer-cuda-graphs, "
                "the host must not wait in a capture"
            )
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        growing = "expandable_segments:True" in environment.get(name, "")
        if growing and environment.get("NCCL_GRAPH_REGISTER") != "0":
            raise WallfacerError(
                f"{name}={environment[name]}: needs NCCL_GRAPH_REGISTER=0 with --wallfacer-cuda-graphs, "
                "NCCL must not register memory that moves"
            )
    nccl = loaded_nccl() if len(set(groups.hosts)) > 1 else None
    if nccl is not None and nccl < _NCCL_ACROSS_NODES:
        raise WallfacerError(
            f"NCCL {'.'.join(map(str, nccl))}: must be {'.'.join(map(str, _NCCL_ACROSS_NODES))} or later with "
            "--wallfacer-cuda-graphs on several nodes, replays can hang with older ones"
        )
