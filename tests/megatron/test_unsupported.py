"""Each combination in the list of unsupported ones is found by its example, and its error names flag and allowed value.

Examples are parsed by Megatron's own parser: a misspelt flag or attribute would never be found.
"""

from __future__ import annotations

import argparse
import re
import shlex
from types import SimpleNamespace

import pytest

from megatron_wallfacer.errors import WallfacerError
from megatron_wallfacer.megatron import unsupported
from megatron_wallfacer.megatron.combination import Combination, both, without
from megatron_wallfacer.megatron.megatron_graphs import attention_in_graphs
from megatron_wallfacer.megatron.unsupported import UNSUPPORTED
from megatron_wallfacer.megatron.version import Version
from tests.megatron.test_arguments import Parse, parse  # noqa: F401

ON = "--wallfacer-cp-size 8"
PACKED = "--dataloader-inter-document-masking"
MODULES = "--cuda-graph-modules"
GRAPHS = "--cuda-graph-impl local"
LOCAL, OUTSIDE = (f"--cuda-graph-impl {name} {MODULES}" for name in ("local", "transformer_engine"))

#: Arguments and the combination that they have, of those that are checked before the first step.
PARSED = {flags: one for one in UNSUPPORTED if "parse" in one.when for flags in (one.example, *one.also)}
#: Settings of a layer or a call.
SET_IN_CODE = [one for one in UNSUPPORTED if "parse" not in one.when]
#: Values of the plugin's own flags that are errors by themselves.
VALUES = {
    "--wallfacer-loss-tiles 0": "--wallfacer-loss-tiles 0: must be a positive whole number",
    "--wallfacer-mlp-tiles x": "--wallfacer-mlp-tiles x: must be a positive whole number",
    "--wallfacer-keep-on-host 0": "--wallfacer-keep-on-host 0: must be auto, or a fraction of the layers, above 0",
}


@pytest.mark.parametrize("flags", PARSED)
def test_an_example_is_the_error_of_its_combination(
    parse: Parse,  # noqa: F811
    flags: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    combination = PARSED[flags]
    if combination.before is not None:
        major, minor = combination.before
        monkeypatch.setattr(unsupported, "megatron_version", lambda: (major, minor - 1, 0))
    with pytest.raises(WallfacerError) as error:
        parse(*ON.split(), *shlex.split(flags))
    if combination.before is not None:
        monkeypatch.setattr(unsupported, "megatron_version", lambda: (*combination.before, 0))
        parse(*ON.split(), *shlex.split(flags))
    named, _, text = str(error.value).partition(": ")
    assert text == combination.message(named, 8).removeprefix(f"{named}: ")
    # Flag and value as typed, and first in the example: the docs' second column is about the first flag of a row.
    first = re.match(r"--\S+(?: [^-\s]\S*)*", named)[0].split(" on ")[0]
    assert f"{flags.replace('=', ' ')} ".startswith(f"{first} ")


@pytest.mark.parametrize("combination", UNSUPPORTED, ids=lambda one: one.example)
def test_a_message_is_one_sentence_with_what_is_allowed_and_why(combination: Combination) -> None:
    message = combination.message("--flag 1", 8)
    assert re.fullmatch(
        r"--flag 1: must [^\n{}]+, because [^\n{}.]+(?: \((?:use|give|limit|leave|pack|put) [^\n]+\))?",
        message.replace("0.1", ""),
    ), message


def test_no_combination_has_two_rows() -> None:
    assert len({one.example for one in UNSUPPORTED}) == len(UNSUPPORTED)


@pytest.mark.parametrize("combination", SET_IN_CODE, ids=lambda one: one.example)
def test_a_setting_is_the_error_of_its_combination(combination: Combination) -> None:
    name, _, value = combination.example.partition("=")
    setting, (when,) = SimpleNamespace(**{name: True if value == "True" else value}), combination.when
    named = name if value == "True" else f"{name} {value}"
    assert unsupported.unsupported(when, setting, 8) == combination.message(named, 8)
    assert unsupported.unsupported(when, SimpleNamespace(), 8) is None
    if combination.distributed_only:
        assert unsupported.unsupported(when, setting, 1) is None


@pytest.mark.parametrize("flags", VALUES)
def test_a_value_that_is_not_allowed(parse: Parse, flags: str) -> None:  # noqa: F811
    with pytest.raises(WallfacerError, match=re.escape(VALUES[flags])):
        parse(*ON.split(), *flags.split())


@pytest.mark.parametrize("flags", [flags for flags in PARSED if "--wallfacer-" not in flags])
def test_nothing_is_checked_when_the_plugin_is_off(parse: Parse, flags: str) -> None:  # noqa: F811
    parse(*shlex.split(flags))


def test_megatrons_default_dropout_is_named_as_a_default(parse: Parse) -> None:  # noqa: F811
    state = parse(*ON.split())
    state.args.attention_dropout = 0.1
    with pytest.raises(WallfacerError, match=r"--attention-dropout 0\.1 \(Megatron's default\): must be 0"):
        unsupported.check_supported(state.args, argv=[])


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


WHOLE = "must be left out, because the plugin does not capture its attention inside a graph of a whole iteration"
LATER = "must be left out before Megatron 0.19, because graphs of earlier releases reuse memory"
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
def test_graphs_of_each_release(
    parse: Parse,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    version: Version,
    implementation: str,
    modules: str,
    said: str | None,
) -> None:
    args = parse(*ON.split()).args
    name = "cuda_graph_scope" if version < (0, 18) else "cuda_graph_modules"
    graphs = {"cuda_graph_impl": implementation, "cuda_graph_scope": None, "cuda_graph_modules": None}
    args = argparse.Namespace(**(vars(args) | graphs | {name: modules.split()}))
    monkeypatch.setattr(unsupported, "megatron_version", lambda: version)
    held, found = attention_in_graphs(args), unsupported.unsupported("parse", args, 8) or ""
    assert (held is None) == (said is None)
    assert found.startswith(f"{held}: {said}" if said else "")
    assert bool(found) == bool(said)


def test_without_context_parallelism_no_sequence_is_split(parse: Parse) -> None:  # noqa: F811
    parse("--wallfacer-cp-size", "1", PACKED, "--mtp-num-layers", "1", "--position-embedding-type", "rope")
    parse("--wallfacer-cp-size", "1", "--wallfacer-layers", "1", "--transformer-impl", "local")


def test_flags_that_are_not_given_need_no_other_attributes() -> None:
    """Arguments of a script without Megatron's parser lack most attributes."""

    def unread(*_: object) -> str:
        raise AttributeError

    for find in (both(lambda *_: None, unread), without(lambda *_: None, unread)):
        assert find(argparse.Namespace(), ()) is None
