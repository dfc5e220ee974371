"""CUDA graphs: which of Megatron's own leave attention out, and so need nothing of the plugin."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

#: By implementation, modules of Megatron's graphs that hold no attention. With ``local`` a layer that has ``mlp`` or
#: ``moe`` among its modules is captured whole (``TransformerLayer.create_mcore_cudagraph_manager``).
_WITHOUT_ATTENTION = {
    "local": ("moe_router", "moe_preprocess"),
    "transformer_engine": ("mlp", "moe", "moe_router", "moe_preprocess"),
}
#: Module that Megatron 0.18 and later takes for the implementation of that name.
_WHOLE = "full_iteration"


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
