"""The unmodified pretrain_gpt.py of Megatron-LM checkouts, where MEGATRON_PATHS=a:b:c names some."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from megatron_wallfacer.megatron.version import _read_version
from megatron_wallfacer.training_runs.corpus import tokenizer_arguments
from tests.megatron.training import GRAD_NORM_TOLERANCE, LOSS_TOLERANCE, arguments, differences
from tests.support.megatron_runs import train

CHECKOUTS = [Path(path) for path in os.environ.get("MEGATRON_PATHS", "").split(":") if path]


@pytest.mark.skipif(not CHECKOUTS, reason="MEGATRON_PATHS names no Megatron-LM checkout")
@pytest.mark.parametrize("checkout", CHECKOUTS, ids=str)
def test_parity_in_an_unmodified_checkout(checkout: Path) -> None:
    version = _read_version(checkout / "megatron" / "core" / "package_info.py")
    tokenizer = tokenizer_arguments(version[:2])
    script = checkout / "pretrain_gpt.py"
    whole = train(1, arguments(*tokenizer), script=script).check()
    split = train(
        4, arguments(*tokenizer, "--wallfacer-cp-size", "4", "--wallfacer-team-size", "2"), script=script
    ).check()
    loss, grad_norm = differences(split, whole)
    assert loss <= LOSS_TOLERANCE
    assert grad_norm <= GRAD_NORM_TOLERANCE
    assert "wallfacer: 2 of 2 attention layers" in split.output
