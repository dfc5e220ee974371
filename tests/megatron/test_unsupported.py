"""Unsupported combinations are errors that name the flag, and every rule names a flag that Megatron really has."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

import pytest

from megatron_wallfacer.errors import WallfacerError
from megatron_wallfacer.megatron import core_attention, unsupported
from megatron_wallfacer.megatron.hooks import arguments as hooks_arguments
from megatron_wallfacer.megatron.megatron_graphs import attention_in_graphs, unsupported_graphs
from megatron_wallfacer.megatron.version import Version
from tests.megatron.test_arguments import Parse, parse  # noqa: F401

ON = "--wallfacer-cp-size 8"
PACKED = "--dataloader-inter-document-masking"
MODULES = "--cuda-graph-modules"
GRAPHS = "--cuda-graph-impl local"
ON_HOST = "--wallfacer-keep-on-host 1 --wallfacer-keep-attention-output --recompute-activations"
INPUTS = "--wallfacer-layer-inputs-on-host 1 --recompute-granularity full"
LOCAL, OUTSIDE = (f"--cuda-graph-impl {name} {MODULES}" for name in ("local", "transformer_engine"))
TABLES = Path(__file__).resolve().parents[2] / "docs" / "unsupported.md"

UNSUPPORTED = {
    "--yaml-cfg job.yaml": "--yaml-cfg job.yaml: must be left out",
    "--context-parallel-size 4": "--context-parallel-size 4: must be 8",
    "--context-parallel-size 1": "--context-parallel-size 1: must be 8",
    "--context-parallel-size=2": "--context-parallel-size 2: must be 8",
    "--seq-length 1000": "--seq-length 1000: must be a multiple of 2 x --wallfacer-cp-size = 16",
    "--cp-comm-type p2p": "--cp-comm-type p2p: must be left out",
    "--hierarchical-context-parallel-sizes 2 4": "--hierarchical-context-parallel-sizes 2 4: must be left out",
    "--hybrid-context-parallel": "--hybrid-context-parallel: must be left out",
    "--tensor-model-parallel-size 2": "--wallfacer-cp-size 8: times tensor and pipeline parallel size (2) it must",
    "--encoder-seq-length 1000": "--encoder-seq-length 1000: must be a multiple of 2 x --wallfacer-cp-size = 16",
    "--attention-backend flash": "--attention-backend flash: must be auto",
    "--attention-dropout 0.1": "--attention-dropout 0.1: must be 0",
    "--window-size 128": "--window-size 128: must be LEFT,RIGHT",
    "--window-size 128,-2": "--window-size 128,-2: must be LEFT,RIGHT",
    "--reset-attention-mask": "--reset-attention-mask: must be left out",
    f"{PACKED} --position-embedding-type rope": f"{PACKED}: needs --no-rope-fusion",
    f"{PACKED} --position-embedding-type mrope": f"--position-embedding-type mrope: must be another with {PACKED}",
    f"{PACKED} --mtp-num-layers 1": f"--mtp-num-layers 1: must be left out with {PACKED}",
    "--sft --micro-batch-size 2 --pipeline-model-parallel-size 2": "--micro-batch-size 2: must be 1 with --sft and",
    "--wallfacer-keep-attention-output": "--wallfacer-keep-attention-output: needs attention to be recomputed",
    "--wallfacer-cuda-graphs --wallfacer-transfers staged": "--wallfacer-cuda-graphs: must be left out with",
    "--wallfacer-cuda-graphs --wallfacer-log-metrics --tensorboard-dir x": "--wallfacer-cuda-graphs: must be left out",
    "--qk-clip": "--qk-clip: must be left out",
    "--log-max-attention-logit": "--log-max-attention-logit: must be left out",
    "--cuda-graph-impl full_iteration": "--cuda-graph-impl full_iteration: must be left out",
    # With this implementation Megatron captures the whole layer for the sake of its MLP.
    f"{LOCAL} mlp --sft": f"{LOCAL} mlp: must be left out with --sft, or {MODULES} limited to moe_router",
    f"{OUTSIDE} attn moe_router {PACKED}": f"{OUTSIDE} attn moe_router: must be left out with {PACKED}, or {MODULES}",
    f"--wallfacer-timeline x {GRAPHS}": f"{GRAPHS}: must be left out with --wallfacer-timeline, or {MODULES} limited",
    f"--wallfacer-log-metrics --tensorboard-dir x {GRAPHS}": f"{GRAPHS}: must be left out with --wallfacer-log-metrics",
    f"--wallfacer-keep-attention-output --recompute-activations {GRAPHS}": f"{GRAPHS}: must be left out with --wallf",
    f"--wallfacer-transfers staged {GRAPHS}": f"{GRAPHS}: must be left out with --wallfacer-transfers staged",
    "--cuda-graph-scope full_iteration": "--cuda-graph-scope full_iteration: must be left out",
    "--position-embedding-type relative": "--position-embedding-type relative: must be rope",
    "--transformer-impl inference_optimized": "--transformer-impl inference_optimized: must be local or",
    "--wallfacer-layers 1 --transformer-impl local": "--wallfacer-layers 1: must be left out with --transformer-impl",
    "--wallfacer-mlp-tiles 4 --fp8-format hybrid": "--wallfacer-mlp-tiles: must be left out with --fp8 hybrid",
    "--wallfacer-mlp-tiles 4 --fp4-format e2m1": "--wallfacer-mlp-tiles: must be left out with --fp4 e2m1",
    "--wallfacer-mlp-tiles 4 --delay-wgrad-compute": "--wallfacer-mlp-tiles: must be left out with --delay-wgrad",
    "--wallfacer-mlp-tiles 4 --grad-reduce-in-bf16": "--wallfacer-mlp-tiles: must be left out with --grad-reduce-in",
    "--wallfacer-mlp-tiles 4 --tp-comm-overlap": "--wallfacer-mlp-tiles: must be left out with --tp-comm-overlap",
    "--wallfacer-mlp-tiles 4 --mlp-chunks-for-training 2": "--wallfacer-mlp-tiles: must be left out with --mlp-chunks",
    "--wallfacer-mlp-tiles 4 --recompute-granularity selective --recompute-modules mlp": "--wallfacer-mlp-tiles: must "
    "be left out with --recompute-modules mlp",
    f"--wallfacer-mlp-tiles 4 {GRAPHS}": f"--wallfacer-mlp-tiles: must be left out with {GRAPHS}, a captured graph",
    f"--wallfacer-mlp-tiles 4 {OUTSIDE} mlp": "--wallfacer-mlp-tiles: must be left out with --cuda-graph-impl trans",
    "--wallfacer-loss-tiles 4 --mtp-num-layers 1": "--wallfacer-loss-tiles: must be left out with --mtp-num-layers 1",
    "--wallfacer-loss-tiles 4 --defer-embedding-wgrad-compute": "--wallfacer-loss-tiles: must be left out with --defer",
    "--wallfacer-loss-tiles 4 --overlap-moe-expert-parallel-comm": "--wallfacer-loss-tiles: must be left out with "
    "--overlap-moe-expert-parallel-comm",
    "--wallfacer-loss-tiles 4 --grad-reduce-in-bf16": "--wallfacer-loss-tiles: must be left out with --grad-reduce-in",
    "--wallfacer-loss-tiles 0": "--wallfacer-loss-tiles 0: must be a positive whole number",
    "--wallfacer-mlp-tiles x": "--wallfacer-mlp-tiles x: must be a positive whole number",
    "--wallfacer-loss-tiles 4 --fp8-format hybrid": "--wallfacer-loss-tiles: must be left out with --fp8 hybrid",
    "--wallfacer-loss-tiles 4 --fp4-format e2m1": "--wallfacer-loss-tiles: must be left out with --fp4 e2m1",
    "--wallfacer-loss-tiles 4 --delay-wgrad-compute": "--wallfacer-loss-tiles: must be left out with --delay-wgrad",
    "--wallfacer-keep-on-host 0": "--wallfacer-keep-on-host 0: must be auto, or a part of the layers above 0",
    "--wallfacer-keep-on-host 1": "--wallfacer-keep-on-host 1.0: needs --wallfacer-keep-attention-output",
    f"{ON_HOST} --fine-grained-activation-offloading": "--wallfacer-keep-on-host 1.0: must be left out with --fine-",
    f"{ON_HOST} --cpu-offloading-num-layers 1": "--wallfacer-keep-on-host 1.0: must be left out with --cpu-offl",
    f"{ON_HOST} --overlap-moe-expert-parallel-comm": "--wallfacer-keep-on-host 1.0: must be left out with --overlap",
    "--wallfacer-layer-inputs-on-host 1": "--wallfacer-layer-inputs-on-host 1.0: needs --recompute-granularity full",
    f"{INPUTS} --fp8-format hybrid": "--wallfacer-layer-inputs-on-host 1.0: must be left out with --fp8 hybrid, ",
    f"{INPUTS} --fp4-format e2m1": "--wallfacer-layer-inputs-on-host 1.0: must be left out with --fp4 e2m1, Megatron",
    f"{INPUTS} --fine-grained-activation-offloading": "--wallfacer-layer-inputs-on-host 1.0: must be left out with --f",
    f"{INPUTS} --cpu-offloading-num-layers 1": "--wallfacer-layer-inputs-on-host 1.0: must be left out with --cpu-off",
    f"{INPUTS} --distribute-saved-activations": "--wallfacer-layer-inputs-on-host 1.0: must be left out with --dist",
    f"{INPUTS} {GRAPHS}": f"--wallfacer-layer-inputs-on-host 1.0: must be left out with {GRAPHS}, a captured graph",
    "--heterogeneous-layers-config-path x.json": "--heterogeneous-layers-config-path x.json: must be left out",
    "--heterogeneous-layers-config-encoded-json {}": "--heterogeneous-layers-config-encoded-json {}: must be left out",
    "--experimental-attention-variant gated_delta_net": "--experimental-attention-variant gated_delta_net: must be",
    "--hybrid-layer-pattern M*M*": "--hybrid-layer-pattern M*M*: must be left out",
    "--hybrid-override-pattern M*M*": "--hybrid-override-pattern M*M*: must be left out",
}


@pytest.mark.parametrize("flags", UNSUPPORTED)
def test_an_error_has_flag_value_and_what_is_allowed(parse: Parse, flags: str) -> None:  # noqa: F811
    with pytest.raises(WallfacerError, match=re.escape(UNSUPPORTED[flags])) as error:
        parse(*ON.split(), *flags.split())
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("flags", [flags for flags in UNSUPPORTED if not flags.startswith("--wallfacer-")])
def test_none_of_it_is_our_business_when_the_plugin_is_off(parse: Parse, flags: str) -> None:  # noqa: F811
    parse(*flags.split())


def test_megatrons_default_dropout_is_named_as_a_default(parse: Parse, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    session = parse(*ON.split())
    session.args.attention_dropout = 0.1
    with pytest.raises(WallfacerError, match=r"--attention-dropout 0\.1 \(Megatron's default\): must be 0"):
        unsupported.check_supported(session.args, argv=[])


def tables() -> list[list[str]]:
    """First columns of the tables in the docs, as typed."""
    found: list[list[str]] = []
    for line in TABLES.read_text().splitlines():
        if line.startswith("| --- "):
            found.append([])
        elif line.startswith("| `") and found:
            found[-1].append(line.split("`")[1])
    return found


def test_the_docs_list_what_is_unsupported() -> None:
    """Each row is typed above; other spellings of a combination need no row of their own."""
    spellings = {"--context-parallel-size 1", "--context-parallel-size=2", "--encoder-seq-length 1000"}
    assert set(tables()[0]) == set(UNSUPPORTED) - spellings


def test_the_docs_list_the_settings_that_a_layer_checks() -> None:
    class Asked(dict):
        """A configuration that has what is wanted, and remembers what that was."""

        def __getattr__(self, name: str) -> object:
            self[name] = True
            raise AttributeError(name)

    asked = Asked()
    core_attention._check_config(asked, "layer 1")
    assert tables()[1] == list(asked)


@pytest.mark.parametrize(
    "flags",
    [
        "--window-size 128,0",
        "--window-size=-1,0",
        "--window-size 128,0 --wallfacer-window-scheme ulysses",
        "--softmax-type learnable",
        "--softmax-type off-by-one",
        "--sft",
        PACKED,
        f"{PACKED} --position-embedding-type rope --no-rope-fusion",
        f"{PACKED} --sft --position-embedding-type rope",
        "--multi-latent-attention",
        f"{MODULES} attn",
        f"{LOCAL} moe_router moe_preprocess",
        f"{OUTSIDE} mlp moe_router moe_preprocess",
        "--cuda-graph-impl transformer_engine --cuda-graph-scope moe_router",
        f"--external-cuda-graph {MODULES} mlp",
        GRAPHS,
        "--enable-cuda-graph --wallfacer-cuda-graphs",
        f"{OUTSIDE} attn --recompute-activations",
    ],
)
def test_a_supported_combination_is_no_error(parse: Parse, flags: str) -> None:  # noqa: F811
    unsupported.check_supported(parse(*ON.split(), *flags.split()).args)


WHOLE = "must be left out with --wallfacer-cp-size, attention inside a graph of the whole iteration is not supported"
LATER = "needs Megatron 0.19 or later with --wallfacer-cp-size, or --cuda-graph-"
#: Release of Megatron, implementation, modules or scopes; what is said. None: they hold no attention; empty: they
#: may hold it.
BY_RELEASE = [
    ((0, 17, 1), "local", "moe_router", None),
    ((0, 17, 1), "local", "attn", LATER),
    ((0, 17, 1), "local", "moe_router mlp", LATER),
    ((0, 17, 1), "local", "", LATER),
    ((0, 17, 1), "local", "full_iteration", WHOLE),
    ((0, 17, 1), "transformer_engine", "mlp moe moe_router moe_preprocess", None),
    ((0, 17, 1), "transformer_engine", "attn", ""),
    ((0, 18, 2), "local", "moe_preprocess moe_router", None),
    ((0, 18, 2), "local", "", LATER),
    ((0, 18, 2), "full_iteration", "", WHOLE),
    ((0, 19, 0), "local", "moe_router", None),
    ((0, 19, 0), "local", "mlp", ""),
    ((0, 19, 0), "local", "", ""),
    ((0, 19, 0), "transformer_engine", "moe mlp", None),
    ((0, 20, 0), "local", "attn", ""),
    ((0, 20, 0), "none", "", None),
]


@pytest.mark.parametrize(("version", "implementation", "modules", "said"), BY_RELEASE)
def test_graphs_of_each_release(version: Version, implementation: str, modules: str, said: str | None) -> None:
    name = "cuda_graph_scope" if version < (0, 18) else "cuda_graph_modules"
    args = argparse.Namespace(cuda_graph_impl=implementation, **{name: modules.split()})
    held = attention_in_graphs(args)
    assert (held is None) == (said is None)
    if held is not None:
        found = unsupported_graphs(args, version) or ""
        assert found.startswith(f"{held}: {said}" if said else "")
        assert bool(found) == bool(said)


def test_without_context_parallelism_nothing_is_cut(parse: Parse) -> None:  # noqa: F811
    parse("--wallfacer-cp-size", "1", PACKED, "--mtp-num-layers", "1", "--position-embedding-type", "rope")


def test_every_rule_fires_for_some_real_flag(parse: Parse, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """A rule with a misspelt attribute would never fire, and nobody would notice."""
    fired: set[int] = set()

    def every_rule(args: argparse.Namespace) -> None:
        fired.update(number for number, rule in enumerate(unsupported.RULES) if rule(args, sys.argv) is not None)
        raise WallfacerError("read")

    monkeypatch.setattr(hooks_arguments, "check_supported", every_rule)
    for flags in UNSUPPORTED:
        with pytest.raises(WallfacerError):
            parse(*ON.split(), *flags.split())
    assert fired == set(range(len(unsupported.RULES)))
