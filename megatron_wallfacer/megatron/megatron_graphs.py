"""Megatron's own CUDA graphs: which of them may hold the plugin's attention, by release, and how they are freed."""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Sequence
from typing import NamedTuple

from megatron_wallfacer.errors import WallfacerError
from megatron_wallfacer.megatron.releases import FIRST_LAUNCHED, LOCAL_GRAPHS, version_text
from megatron_wallfacer.megatron.version import Version, megatron_version


class _Implementation(NamedTuple):
    """One of Megatron's implementations of CUDA graphs.

    Attributes:
        without: modules of its graphs that hold no attention.
        since: first release whose graphs may hold the plugin's attention.
        why: what earlier releases lack.
    """

    without: tuple[str, ...]
    since: tuple[int, int]
    why: str = ""


#: With ``local`` a layer that has ``attn``, ``mlp`` or ``moe`` among its modules is captured whole
#: (``TransformerLayer.create_mcore_cudagraph_manager``).
_IMPLEMENTATIONS = {
    "local": _Implementation(
        ("moe_router", "moe_preprocess"), LOCAL_GRAPHS, "earlier releases reuse memory that backward reads"
    ),
    "transformer_engine": _Implementation(("mlp", "moe", "moe_router", "moe_preprocess"), FIRST_LAUNCHED),
}
#: Module that Megatron 0.18 and later takes for the implementation of that name.
_WHOLE = "full_iteration"
#: What cannot run where Megatron's graphs hold attention: attribute, its value as typed, and why.
_NOT_CAPTURED = (
    ("sft", "--sft", "documents differ with each micro-batch"),
    (
        "dataloader_inter_document_masking",
        "--dataloader-inter-document-masking",
        "documents differ with each micro-batch",
    ),
    ("wallfacer_keep_attention_output", "--wallfacer-keep-attention-output", "it reads numbers from the device"),
    ("wallfacer_timeline", "--wallfacer-timeline", "a replay has no steps to record"),
    ("wallfacer_log_metrics", "--wallfacer-log-metrics", "a replay has no waits to time"),
)


def graphs_around_attention(args: argparse.Namespace, argv: Sequence[str]) -> str | None:
    """Return why Megatron's CUDA graphs are not supported; None where they are, hold no attention, or are off."""
    return None if attention_in_graphs(args) is None else unsupported_graphs(args, megatron_version())


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
    known = _IMPLEMENTATIONS.get(implementation)
    if known is not None and set(modules) <= set(known.without):
        return None
    return (
        f"{flag} {' '.join(modules)}" if known is None or _WHOLE in modules else f"{typed} {flag} {' '.join(modules)}"
    )


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


def unsupported_graphs(args: argparse.Namespace, version: Version) -> str | None:
    """Return why Megatron's CUDA graphs around attention are not supported; None where they are.

    Args:
        args: Megatron's arguments, with graphs that hold attention.
        version: of Megatron.
    """
    held, (implementation, _), (flag, modules) = attention_in_graphs(args), _implementation(args), _modules(args)
    known = _IMPLEMENTATIONS.get(implementation)
    if known is None or _WHOLE in modules:
        return (
            f"{held}: must be left out with --wallfacer-cp-size, "
            "attention inside a graph of the whole iteration is not supported"
        )
    if version[:2] < known.since:
        return (
            f"{held}: needs Megatron {version_text(known.since)} or later with --wallfacer-cp-size, "
            f"or {flag} limited to {', '.join(known.without)}: {known.why}"
        )
    for attribute, typed, why in _NOT_CAPTURED:
        if getattr(args, attribute, None):
            return f"{held}: must be left out with {typed}, or {flag} limited to {', '.join(known.without)}: {why}"
    if getattr(args, "wallfacer_transfers", "direct") == "staged":
        return f"{held}: must be left out with --wallfacer-transfers staged, the host copies messages"
    return None


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
