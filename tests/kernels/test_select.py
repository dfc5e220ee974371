from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from megatron_wallfacer.errors import OptionError
from megatron_wallfacer.kernels import protocol, select
from megatron_wallfacer.kernels.optional import UnavailableError
from megatron_wallfacer.kernels.protocol import Inputs
from megatron_wallfacer.kernels.select import KERNELS, candidates, select_kernel
from megatron_wallfacer.megatron.startup_report import _switches
from tests.kernels.releases import ADAPTERS

CPU = {"device": torch.device("cpu"), "dtype": torch.float32, "head_dim": 64}
CUDA = {"device": torch.device("cuda"), "dtype": torch.bfloat16, "head_dim": 64}
INPUTS = Inputs(**CUDA, v_head_dim=64)
_INSTALLED = {
    "te": "transformer-engine 2.20.2",
    "flash4": "flash-attn-4 4.0.0b36",
    "flash3": "flash-attn-3 of main",
    "flash2": "flash-attn 2.8.3",
}

Machine = Callable[..., None]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """``machine((9, 0), "te")``: a GPU of that capability, and the libraries that are installed."""

    def absent(name: str) -> Callable[[], None]:
        def fail() -> None:
            raise UnavailableError(f"{name} is not installed: get it")

        return fail

    def make(capability: tuple[int, int], *installed: str) -> None:
        monkeypatch.setattr(protocol, "capability", lambda device: capability)
        build = {name: ADAPTERS[title] if name in installed else absent(name) for name, title in _INSTALLED.items()}
        entries = tuple(replace(entry, build=build.get(entry.name, entry.build)) for entry in select.REGISTRY)
        monkeypatch.setattr(select, "REGISTRY", entries)

    return make


@pytest.mark.parametrize(("name", "chosen"), [("auto", "torch"), ("torch", "torch"), ("reference", "reference")])
def test_kernel_by_name(name: str, chosen: str) -> None:
    assert select_kernel(name, **CPU).name == chosen


def test_unknown_kernel_is_rejected() -> None:
    with pytest.raises(OptionError) as error:
        select_kernel("triton", **CPU)
    assert (error.value.option, error.value.value) == ("kernel", "triton")
    assert str(error.value) == f"kernel=triton: must be one of {', '.join(KERNELS)}"
    assert {"auto", "flash", *_INSTALLED, "cudnn", "torch", "reference"} <= set(KERNELS)


@pytest.mark.parametrize("name", ["auto", "torch"])
def test_kernel_that_cannot_serve_the_inputs_is_rejected_with_the_reason(name: str) -> None:
    with pytest.raises(OptionError) as error:
        select_kernel(name, **CPU, softcap=30.0)
    reason = "it does not cap logits, softcap is 30.0"
    assert (error.value.option, error.value.value) == ("kernel", name)
    assert str(error.value) == f"kernel={name}: must be reference here, because torch cannot: {reason}"


def test_kernel_is_not_changed_behind_the_users_back_on_another_device() -> None:
    with pytest.raises(OptionError, match="it runs on a CPU, the tensors are on meta"):
        select_kernel("auto", **{**CPU, "device": torch.device("meta")})


def test_reference_serves_what_torch_rejects() -> None:
    assert select_kernel("reference", **CPU, softcap=30.0).name == "reference"


@pytest.mark.parametrize(
    ("capability", "installed", "chosen"),
    [
        ((9, 0), ("te", "flash4", "flash3", "flash2"), "te"),
        ((9, 0), ("flash4", "flash3", "flash2"), "flash4"),
        ((9, 0), ("flash3", "flash2"), "flash3"),
        ((10, 0), ("flash3", "flash2"), "flash2"),
        ((8, 0), ("flash4", "flash3", "flash2"), "flash2"),
        ((9, 0), (), "torch"),
    ],
)
def test_auto_on_cuda_takes_the_first_that_is_installed_and_fits(
    machine: Machine, capability: tuple[int, int], installed: tuple[str, ...], chosen: str
) -> None:
    machine(capability, *installed)
    assert select_kernel("auto", **CUDA).name == chosen
    tried = candidates("auto", INPUTS)
    assert tried[[reason for _, reason in tried].index(None)] == (chosen, None)


def test_flash_is_the_newest_that_fits(machine: Machine) -> None:
    machine((8, 6), *_INSTALLED)
    assert select_kernel("flash", **CUDA).name == "flash2"
    machine((9, 0), *_INSTALLED)
    assert select_kernel("flash", **CUDA).name == "flash4"


@pytest.mark.parametrize("name", _INSTALLED)
def test_a_kernel_by_its_name_is_that_one_or_an_error(machine: Machine, name: str) -> None:
    machine((9, 0), *_INSTALLED)
    assert select_kernel(name, **CUDA).name == name
    machine((9, 0))
    with pytest.raises(OptionError) as error:
        select_kernel(name, **CUDA)
    reason = f"{name} cannot: {name} is not installed: get it"
    assert str(error.value) == f"kernel={name}: must be auto or reference here, because {reason}"


def test_every_candidate_says_why_it_is_not_taken(machine: Machine) -> None:
    machine((8, 0), "te", "flash3", "flash2")
    assert candidates("auto", replace(INPUTS, softcap=30.0)) == [
        ("te", "it does not cap logits, softcap is 30.0"),
        ("flash4", "flash4 is not installed: get it"),
        ("flash3", "it runs on GPUs of compute capability 9.x, this one is 8.0"),
        ("flash2", None),
        ("torch", "it does not cap logits, softcap is 30.0"),
    ]


def test_nothing_falls_back_to_the_reference_on_cuda(machine: Machine) -> None:
    machine((9, 0), "te")
    with pytest.raises(OptionError) as error:
        select_kernel("auto", **{**CUDA, "dtype": torch.float32})
    assert str(error.value).startswith("kernel=auto: must be reference here, because te cannot: it computes in fp16")
    assert "torch cannot: it computes in fp16 and bf16, the tensors are float32" in str(error.value)


@pytest.fixture(autouse=True)
def no_switches(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NVTE_FUSED_ATTN", "NVTE_FLASH_ATTN"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("fused", "flash", "installed", "chosen"),
    [
        ("0", "1", tuple(_INSTALLED), "flash4"),
        ("0", None, (), "torch"),
        ("1", "0", tuple(_INSTALLED), "te"),
        ("1", "1", tuple(_INSTALLED), "te"),
    ],
)
def test_auto_obeys_the_variables_of_transformer_engine(
    machine: Machine,
    monkeypatch: pytest.MonkeyPatch,
    fused: str,
    flash: str | None,
    installed: tuple[str, ...],
    chosen: str,
) -> None:
    machine((9, 0), *installed)
    monkeypatch.setenv("NVTE_FUSED_ATTN", fused)
    if flash is not None:
        monkeypatch.setenv("NVTE_FLASH_ATTN", flash)
    assert select_kernel("auto", **CUDA).name == chosen


def test_with_both_kinds_off_auto_takes_nothing_and_names_work(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine((9, 0), *_INSTALLED)
    monkeypatch.setenv("NVTE_FUSED_ATTN", "0")
    monkeypatch.setenv("NVTE_FLASH_ATTN", "0")
    with pytest.raises(OptionError) as error:
        select_kernel("auto", **CUDA)
    flash = "; ".join(
        f"{name} cannot: NVTE_FLASH_ATTN=0 turns it off for auto" for name in ("flash4", "flash3", "flash2", "torch")
    )
    assert str(error.value) == (
        "kernel=auto: must be a kernel by its name here, because "
        f"te cannot: NVTE_FUSED_ATTN=0 turns it off for auto; {flash}"
    )
    assert all(reason is not None for _, reason in candidates("auto", INPUTS))
    for name in (*_INSTALLED, "torch", "cudnn", "reference"):
        assert select_kernel(name, **CUDA).name == name
    assert select_kernel("flash", **CUDA).name == "flash4"
    assert select_kernel("auto", **CPU).name == "torch"


def test_the_start_up_block_names_the_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NVTE_FLASH_ATTN", "0")
    assert _switches("auto", CUDA["device"]) == " It was chosen under NVTE_FLASH_ATTN=0."
    assert (_switches("te", CUDA["device"]), _switches("auto", CPU["device"])) == ("", "")


def test_torch_and_cudnn_need_no_library(machine: Machine) -> None:
    machine((9, 0))
    assert type(select_kernel("torch", **CUDA)).__name__ == "TorchFlashKernel"
    assert select_kernel("cudnn", **CUDA).name == "cudnn"


@pytest.mark.parametrize("name", [*_INSTALLED, "flash", "cudnn"])
def test_kernels_for_gpus_are_rejected_on_a_cpu(machine: Machine, name: str) -> None:
    machine((9, 0), *_INSTALLED)
    with pytest.raises(OptionError, match="it runs on a CUDA device, the tensors are on cpu"):
        select_kernel(name, **{**CPU, "dtype": torch.bfloat16})


def test_all_layers_share_a_kernel_and_its_prepared_calls(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "1")
    machine((9, 0), "te")
    kernel = select_kernel("auto", **CUDA)
    assert select_kernel("te", **{**CUDA, "head_dim": 128}) is kernel
    monkeypatch.setenv("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "0")
    other = select_kernel("auto", **CUDA)
    assert (other is not kernel, other.deterministic, kernel.deterministic) == (True, True, False)
