from __future__ import annotations

import pytest
import torch

from megatron_wallfacer.errors import OptionError
from megatron_wallfacer.kernels.select import NOT_BUILT_YET, select_kernel

CPU = {"device": torch.device("cpu"), "dtype": torch.float32, "head_dim": 64}
_NAMES = "one of auto, torch, reference"


@pytest.mark.parametrize(("name", "chosen"), [("auto", "torch"), ("torch", "torch"), ("reference", "reference")])
def test_kernel_by_name(name: str, chosen: str) -> None:
    assert select_kernel(name, **CPU).name == chosen


def test_unknown_kernel_is_refused() -> None:
    with pytest.raises(OptionError) as error:
        select_kernel("triton", **CPU)
    assert (error.value.option, error.value.value) == ("kernel", "triton")
    assert str(error.value) == f"kernel=triton: must be {_NAMES}"


@pytest.mark.parametrize("name", NOT_BUILT_YET)
def test_kernel_that_is_not_built_yet_is_refused_as_such(name: str) -> None:
    with pytest.raises(OptionError) as error:
        select_kernel(name, **CPU)
    assert str(error.value) == f"kernel={name}: must be {_NAMES}; {name} is not built yet"


@pytest.mark.parametrize("name", ["auto", "torch"])
def test_kernel_that_cannot_serve_the_inputs_is_refused_with_the_reason(name: str) -> None:
    with pytest.raises(OptionError) as error:
        select_kernel(name, **CPU, softcap=30.0)
    reason = "it does not cap logits, softcap is 30.0"
    assert (error.value.option, error.value.value) == ("kernel", name)
    assert str(error.value) == f"kernel={name}: must be reference here, because torch cannot: {reason}"


def test_kernel_is_not_changed_behind_the_users_back_on_another_device() -> None:
    with pytest.raises(OptionError, match="it runs on a CPU, the tensors are on meta"):
        select_kernel("auto", **{**CPU, "device": torch.device("meta")})


def test_auto_on_cuda_is_the_only_kernel_that_is_built_for_it() -> None:
    assert select_kernel("auto", **{**CPU, "device": torch.device("cuda")}).name == "reference"


def test_reference_serves_what_torch_refuses() -> None:
    assert select_kernel("reference", **CPU, softcap=30.0).name == "reference"
