"""What is not supported is refused by name, and every rule names a flag that Megatron really has."""

from __future__ import annotations

import re

import pytest

from megatron_wallfacer.errors import WallfacerError
from megatron_wallfacer.megatron import refusals
from tests.megatron.test_arguments import Parse, parse  # noqa: F401

ON = "--wallfacer-cp-size 8"

REFUSED = {
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
    "--window-size 128,0": "--window-size 128 0: must be left out",
    "--softmax-type learnable": "--softmax-type learnable: must be vanilla",
    "--softmax-type off-by-one": "--softmax-type off-by-one: must be vanilla",
    "--reset-attention-mask": "--reset-attention-mask: must be left out",
    "--dataloader-inter-document-masking": "--dataloader-inter-document-masking: must be left out",
    "--sft": "--sft: must be left out",
    "--multi-latent-attention": "--multi-latent-attention: must be left out",
    "--qk-clip": "--qk-clip: must be left out",
    "--log-max-attention-logit": "--log-max-attention-logit: must be left out",
    "--enable-cuda-graph": "--enable-cuda-graph: must be left out",
    "--external-cuda-graph": "--external-cuda-graph: must be left out",
    "--cuda-graph-impl local": "--cuda-graph-impl local: must be none",
    "--position-embedding-type relative": "--position-embedding-type relative: must be rope",
    "--transformer-impl inference_optimized": "--transformer-impl inference_optimized: must be local or",
    "--heterogeneous-layers-config-path x.json": "--heterogeneous-layers-config-path x.json: must be left out",
    "--heterogeneous-layers-config-encoded-json {}": "--heterogeneous-layers-config-encoded-json {}: must be left out",
    "--experimental-attention-variant gated_delta_net": "--experimental-attention-variant gated_delta_net: must be",
    "--hybrid-layer-pattern M*M*": "--hybrid-layer-pattern M*M*: must be left out",
    "--hybrid-override-pattern M*M*": "--hybrid-override-pattern M*M*: must be left out",
}


@pytest.mark.parametrize("flags", REFUSED)
def test_refused_with_flag_value_and_what_is_allowed(parse: Parse, flags: str) -> None:  # noqa: F811
    with pytest.raises(WallfacerError, match=re.escape(REFUSED[flags])) as error:
        parse(*ON.split(), *flags.split())
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("flags", REFUSED)
def test_none_of_it_is_our_business_when_the_plugin_is_off(parse: Parse, flags: str) -> None:  # noqa: F811
    parse(*flags.split())


def test_megatrons_default_dropout_is_named_as_a_default(parse: Parse, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    session = parse(*ON.split())
    session.args.attention_dropout = 0.1
    with pytest.raises(WallfacerError, match=r"--attention-dropout 0\.1 \(Megatron's default\): must be 0"):
        refusals.refuse_unsupported(session.args, argv=[])


def test_every_rule_fires_for_some_real_flag(parse: Parse) -> None:  # noqa: F811
    """A rule with a misspelt attribute would never fire, and nobody would notice."""
    fired = set()
    for flags in map(str.split, REFUSED):
        args = parse(*flags).args
        args.wallfacer_cp_size = 8
        fired |= {number for number, rule in enumerate(refusals.RULES) if rule(args, flags) is not None}
    assert fired == set(range(len(refusals.RULES)))
