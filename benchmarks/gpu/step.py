"""A training step of two layers and head of Llama 3 8B: memory beside the inventory, and the longest sequence.

    python -m benchmarks.gpu.step            on a GPU: one rank of CP 8, its messages not sent
    python -m benchmarks.gpu.step --smoke    anywhere, small; on a CPU nothing is measured

``added`` is what a step allocates beyond parameters, by PyTorch's allocator. The longest sequence is searched to an
eighth, with a kernel that allocates its results and computes nothing; beside it is what the inventory predicts
for the memory that is free.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from benchmarks.gpu.clock import medians
from benchmarks.gpu.memory import added_bytes
from benchmarks.gpu.one_rank import no_transfers
from benchmarks.gpu.report import add_options, device_of, kernel_of
from benchmarks.gpu.rows import Rows
from benchmarks.memory.model import build, run_step
from benchmarks.memory.one_rank import FreshResults, groups_without_messages
from benchmarks.memory.setting import Setting, step_setting
from megatron_wallfacer.kernels.protocol import Kernel
from megatron_wallfacer.planning.inventory import inventory, peak
from megatron_wallfacer.planning.model import MODELS, Model
from megatron_wallfacer.schedule.schemes import make_plan

CP_SIZE, LAYERS = 8, 2
#: By name: recomputation, tiles of the loss, tiles of the MLP.
FEATURES: dict[str, dict[str, Any]] = {
    "full recomputation": {},
    "loss tiles": {"loss_tiles": 16},
    "loss and MLP tiles": {"loss_tiles": 16, "mlp_tiles": 8},
    "kept attention output": {"loss_tiles": 16, "mlp_tiles": 8, "recompute": "keep-attention"},
}
#: Measured memory and the longest sequence may differ by this part from what the inventory says.
ALLOWED = 0.1
#: The longest sequence is searched from so many tokens per rank on, a multiple of it.
FIRST = 8192


def setting_of(model: Model, tokens: int, feature: str) -> Setting:
    """Return the step of a feature.

    Args:
        model: sizes.
        tokens: tokens per rank.
        feature: one of :data:`FEATURES`.
    """
    plan = make_plan("ring", CP_SIZE, q_heads=model.q_heads, kv_heads=model.kv_heads)
    return step_setting(model, plan, tokens, layers=LAYERS, **FEATURES[feature])


def expected_bytes(setting: Setting) -> float:
    """Return the peak of the inventory."""
    return peak(inventory(setting.work))[1]


def step_of(setting: Setting, kernel: Kernel, device: torch.device) -> Callable[[], None]:
    """Return a function that runs the step once; its model has random weights."""
    model = build(setting, no_transfers(setting.plan), kernel).to(device)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.02)
    tokens = torch.zeros(1, setting.work.tokens, dtype=torch.long, device=device)
    return partial(run_step, model, setting.work, tokens)


def measure_step(model: Model, feature: str, options: argparse.Namespace) -> Iterator[tuple[str, ...]]:
    """Time and memory of one step."""
    device = device_of(options)
    setting = setting_of(model, options.tokens, feature)
    step = step_of(setting, kernel_of(options, device, torch.bfloat16), device)
    seconds = medians({"": step}, device, options.repeats)[""]
    expected = expected_bytes(setting)
    added = added_bytes(step) if device.type == "cuda" else None
    yield f"{1e3 * seconds:.0f}", *compared(added, expected, 1e9)


def measure_longest(model: Model, feature: str, options: argparse.Namespace) -> Iterator[tuple[str, ...]]:
    """The longest sequence, in thousands of tokens per rank."""
    if device_of(options).type != "cuda":
        predicted = longest(lambda tokens: expected_bytes(setting_of(model, tokens, feature)) < 1e9)
        yield "-", *compared(None, predicted, 1e3)
        return
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0] - 2.0 * (LAYERS * model.layer_parameters + model.vocabulary_parameters)
    predicted = longest(lambda tokens: expected_bytes(setting_of(model, tokens, feature)) < free)
    found = longest(lambda tokens: _fits(setting_of(model, tokens, feature)))
    yield "-", *compared(found, predicted, 1e3)


def longest(fits: Callable[[int], bool]) -> int:
    """Return the most tokens that fit: doubled while they do, then halving the interval up to the next doubling.

    Args:
        fits: whether so many tokens do; 0 is returned where :data:`FIRST` do not.
    """
    tokens = 0
    while fits(2 * tokens or FIRST):
        tokens = 2 * tokens or FIRST
    for part in (tokens // 2, tokens // 4, tokens // 8):
        tokens += part if part and fits(tokens + part) else 0
    return tokens


def _fits(setting: Setting) -> bool:
    try:
        step_of(setting, FreshResults(), torch.device("cuda"))()
    except torch.OutOfMemoryError:
        return False
    finally:
        torch.cuda.empty_cache()
    return True


def compared(measured: float | None, expected: float, unit: float) -> tuple[str, ...]:
    """Return the cells of a measured and an expected value, and the verdict.

    Args:
        measured: None where nothing is measured.
        expected: by the inventory.
        unit: both are shown in it.
    """
    if measured is None:
        return "-", f"{expected / unit:.2f}", "-", "ok: not measured"
    ratio = measured / expected
    verdict = "ok" if abs(ratio - 1) <= ALLOWED else f"over: differs by more than {ALLOWED:.0%}"
    return f"{measured / unit:.2f}", f"{expected / unit:.2f}", f"{ratio:.3f}", verdict


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print and save; 1 if memory is not as the inventory says."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add_options(parser)
    parser.add_argument("--tokens", type=int, default=16384, help="tokens per rank of the timed steps (default: 16384)")
    options = parser.parse_args(argv)
    model = MODELS["llama3-8b"]
    if options.smoke:
        options.tokens, options.repeats, options.head_dim = 128, 1, 16
        model = replace(model, hidden=64, q_heads=4, kv_heads=2, head_dim=16, ffn_hidden=128, vocabulary=512)
    from megatron_wallfacer.megatron import any_device, cpu_runtime

    # Decided before Megatron's CPU runtime, which has PyTorch say that there is a GPU.
    options.device = device_of(options).type
    if options.device == "cpu":
        cpu_runtime.install()
    any_device.install()
    with groups_without_messages(1, CP_SIZE):
        from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

        model_parallel_cuda_manual_seed(1)
        rows = Rows("step", ("what", "feature"), ("ms", "measured", "expected", "ratio"), options)
        for feature in FEATURES:
            rows.measure(("GB added", feature), partial(measure_step, model, feature, options))
        for feature in FEATURES:
            rows.measure(("longest, K tokens per rank", feature), partial(measure_longest, model, feature, options))
        return rows.close()


if __name__ == "__main__":
    sys.exit(main())
