"""Find out whether Megatron's own CUDA graphs contain attention or MLPs. Free graphs before their process groups."""

from __future__ import annotations

import argparse
import gc
import sys

from megatron_wallfacer.errors import WallfacerError

#: Modules whose CUDA graphs contain no attention, by implementation. ``local`` captures the whole layer if ``attn``,
#: ``mlp`` or ``moe`` is among its modules (``TransformerLayer.create_mcore_cudagraph_manager``).
_WITHOUT_ATTENTION = {
    "local": ("moe_router", "moe_preprocess"),
    "transformer_engine": ("mlp", "moe", "moe_router", "moe_preprocess"),
}
#: Module name that Megatron 0.18 and later converts to the implementation ``full_iteration``.
_WHOLE = "full_iteration"


def attention_in_graphs(args: argparse.Namespace) -> str | None:
    """Return the flag, as typed, that puts attention into Megatron's CUDA graphs, or None.

    ``args`` are Megatron's arguments or a TransformerConfig.
    """
    implementation, typed = _implementation(args)
    flag, modules = _modules(args)
    if implementation == "none" and _WHOLE not in modules:
        return None
    if not modules:
        return typed
    if set(modules) <= set(_WITHOUT_ATTENTION.get(implementation, ())):
        return None
    alone = implementation not in _WITHOUT_ATTENTION or _WHOLE in modules
    return f"{flag} {' '.join(modules)}" if alone else f"{typed} {flag} {' '.join(modules)}"


def mlp_in_graphs(args: argparse.Namespace) -> str | None:
    """Return the flag, as typed, that puts dense MLPs into Megatron's CUDA graphs, or None."""
    implementation, typed = _implementation(args)
    flag, modules = _modules(args)
    if implementation == "none":
        return None
    holding = ("attn", "mlp") if implementation == "local" else ("mlp",)
    if modules and not set(modules) & set(holding):
        return None
    return f"{typed} {flag} {' '.join(modules)}" if modules else typed


def whole_iteration_graph(args: argparse.Namespace) -> str | None:
    """Return the flag, as typed, that captures a whole iteration in one CUDA graph, or None."""
    (implementation, _), (_, modules) = _implementation(args), _modules(args)
    known = implementation in _WITHOUT_ATTENTION and _WHOLE not in modules
    return None if known else attention_in_graphs(args)


def local_graphs_around_attention(args: argparse.Namespace) -> str | None:
    """Return the flag, as typed, with which the implementation ``local`` captures attention in CUDA graphs, or None."""
    return attention_in_graphs(args) if _implementation(args)[0] == "local" else None


def _implementation(args: argparse.Namespace) -> tuple[str, str]:
    """Return Megatron's implementation of CUDA graphs, and the flag, as typed, that selects the implementation."""
    if getattr(args, "enable_cuda_graph", False):
        return "local", "--enable-cuda-graph"
    if getattr(args, "external_cuda_graph", False):
        return "transformer_engine", "--external-cuda-graph"
    implementation = getattr(args, "cuda_graph_impl", "none")
    return implementation, f"--cuda-graph-impl {implementation}"


def _modules(args: argparse.Namespace) -> tuple[str, list[str]]:
    """Return the flag that lists the modules in CUDA graphs, and the list. Old releases use --cuda-graph-scope."""
    old = getattr(args, "cuda_graph_scope_deprecated", None) or getattr(args, "cuda_graph_scope", None)
    new = getattr(args, "cuda_graph_modules", None)
    flag = "--cuda-graph-scope" if old or new is None else "--cuda-graph-modules"
    # Most modules are enums, some are strings. The module "full" means all modules, like an empty list.
    names = [getattr(module, "name", module) for module in old or new or ()]
    return flag, [name for name in names if name != "full"]


def check_config(config: argparse.Namespace, expected: str | None, where: str) -> None:
    """Raise a WallfacerError if a script's code, instead of a flag, puts a layer's attention into CUDA graphs.

    ``config`` is Megatron's TransformerConfig. ``expected`` is the result of :func:`attention_in_graphs` for the
    command line.
    """
    held = attention_in_graphs(config)
    if held is not None and expected is None:
        raise WallfacerError(f"{where}: {held}: must be on the command line with --wallfacer-cp-size, not set in code")


def free_graphs() -> None:
    """Free the CUDA graphs of Megatron's implementation ``local``. Megatron's training loop does not free them.

    Graphs of the implementation ``transformer_engine`` are freed by Megatron's training loop.
    """
    runner = getattr(sys.modules.get("megatron.core.transformer.cuda_graphs"), "_CudaGraphRunner", None)
    if runner is None:
        return
    # Megatron keeps no list of the runners after capture.
    for found in [x for x in gc.get_objects() if issubclass(type(x), runner)]:
        for name in ("fwd_graph", "bwd_graph"):
            graph = getattr(found, name, None)
            if graph is not None:
                graph.reset()
                setattr(found, name, None)
