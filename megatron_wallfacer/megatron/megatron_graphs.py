"""Megatron's own CUDA graphs: which of them hold attention, and how they are freed."""

from __future__ import annotations

import argparse
import gc
import sys

from megatron_wallfacer.errors import WallfacerError

#: Modules whose graphs hold no attention, by implementation. With ``local`` a layer that has ``attn``, ``mlp`` or
#: ``moe`` among its modules is captured whole (``TransformerLayer.create_mcore_cudagraph_manager``).
_WITHOUT_ATTENTION = {
    "local": ("moe_router", "moe_preprocess"),
    "transformer_engine": ("mlp", "moe", "moe_router", "moe_preprocess"),
}
#: Module that Megatron 0.18 and later takes for the implementation of that name.
_WHOLE = "full_iteration"


def attention_in_graphs(args: argparse.Namespace) -> str | None:
    """Return the flag, as typed, by which Megatron's CUDA graphs hold attention; None where they hold none.

    Args:
        args: Megatron's arguments or a TransformerConfig.
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
    """Return the flag, as typed, by which Megatron's CUDA graphs hold dense MLPs; None where they hold none.

    Args:
        args: Megatron's arguments.
    """
    implementation, typed = _implementation(args)
    flag, modules = _modules(args)
    if implementation == "none":
        return None
    holding = ("attn", "mlp") if implementation == "local" else ("mlp",)
    if modules and not set(modules) & set(holding):
        return None
    return f"{typed} {flag} {' '.join(modules)}" if modules else typed


def whole_iteration_graph(args: argparse.Namespace) -> str | None:
    """Return the flag, as typed, by which one CUDA graph holds a whole iteration; None where none does.

    Args:
        args: Megatron's arguments.
    """
    (implementation, _), (_, modules) = _implementation(args), _modules(args)
    known = implementation in _WITHOUT_ATTENTION and _WHOLE not in modules
    return None if known else attention_in_graphs(args)


def local_graphs_around_attention(args: argparse.Namespace) -> str | None:
    """Return the flag, as typed, by which CUDA graphs of ``local`` hold attention; None where they hold none.

    Args:
        args: Megatron's arguments.
    """
    return attention_in_graphs(args) if _implementation(args)[0] == "local" else None


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


def check_config(config: argparse.Namespace, expected: str | None, where: str) -> None:
    """Check that a layer is captured only as the command line says: a script may set graphs in code.

    Args:
        config: Megatron's TransformerConfig.
        expected: what the command line gave, as :func:`attention_in_graphs` names it.
        where: the layer, for messages.

    Raises:
        WallfacerError: graphs around attention that were not checked at start.
    """
    held = attention_in_graphs(config)
    if held is not None and expected is None:
        raise WallfacerError(f"{where}: {held}: must be on the command line with --wallfacer-cp-size, not set in code")


def free_graphs() -> None:
    """Free the graphs of Megatron's ``local`` implementation, which holds them until the process ends.

    Those of ``transformer_engine`` are freed by Megatron's training loop.
    """
    runner = getattr(sys.modules.get("megatron.core.transformer.cuda_graphs"), "_CudaGraphRunner", None)
    if runner is None:
        return
    # Runners are in no list once their graphs are made.
    for found in [x for x in gc.get_objects() if issubclass(type(x), runner)]:
        for name in ("fwd_graph", "bwd_graph"):
            graph = getattr(found, name, None)
            if graph is not None:
                graph.reset()
                setattr(found, name, None)
