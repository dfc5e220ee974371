"""Head and loss in tiles of tokens, all tokens at once, and PyTorch's `linear_cross_entropy`: time, memory, error.

    python -m benchmarks.gpu.loss_tiles            on a GPU: Llama 3's head, 16,384 tokens
    python -m benchmarks.gpu.loss_tiles --smoke    anywhere, small

Each row is forward and backward of the head alone, on one tensor-parallel rank. Errors are those of the input's
gradient against fp32 weights and inputs, all tokens at once.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from benchmarks.gpu.clock import medians
from benchmarks.gpu.memory import added_bytes
from benchmarks.gpu.report import add_options, device_of, relative_error
from benchmarks.gpu.rows import LeftOut, Rows

#: Tiles may have at most this many times the error of all tokens at once.
ALLOWED = 1.2
_MIB = 1 << 20


class Head:
    """The vocabulary head of a model.

    Args:
        options: tokens, hidden, vocabulary, dtype, device.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.device, self.dtype = device_of(options), getattr(torch, options.dtype)
        generator = torch.Generator().manual_seed(1)
        sizes = (options.vocabulary, options.hidden), (options.tokens, 1, options.hidden)
        scales = options.hidden**-0.5, 1.0
        made = (torch.randn(size, generator=generator) * scale for size, scale in zip(sizes, scales, strict=True))
        self.weight, self.hidden = (x.to(self.device, self.dtype) for x in made)
        labels = torch.randint(options.vocabulary, (1, options.tokens), generator=generator)
        self.labels = labels.to(self.device)
        self.layer = _output_layer(options, self.device, self.dtype)
        with torch.no_grad():
            self.layer.weight.copy_(self.weight)

    def tiled(self, tiles: int) -> Tensor:
        """Gradient of the input by ``--wallfacer-loss-tiles``."""
        from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

        from megatron_wallfacer.megatron.loss_tiles import tiled_loss

        hidden = self.hidden.detach().requires_grad_()
        losses = tiled_loss(
            tiles,
            hidden_states=hidden,
            output_layer=self.layer,
            output_weight=None,
            labels=self.labels,
            runtime_gather_output=None,
            compute_language_model_loss=lambda labels, logits: vocab_parallel_cross_entropy(logits, labels.t()).t(),
            scale_logits=lambda logits: logits,
        )
        losses.sum().backward()
        self.layer.weight.grad = None
        return hidden.grad

    def of_pytorch(self) -> Tensor:
        """Gradient of the input by PyTorch's function."""
        hidden, weight = self.hidden.detach().requires_grad_(), self.weight.detach().requires_grad_()
        options = torch.nn.LinearCrossEntropyOptions()
        rows = hidden.flatten(0, 1), weight, self.labels.flatten()
        functional.linear_cross_entropy(*rows, reduction="none", options=options).sum().backward()
        return hidden.grad

    def exact(self) -> Tensor:
        """Gradient of the input in fp32."""
        hidden = self.hidden.float().requires_grad_()
        logits = functional.linear(hidden.flatten(0, 1), self.weight.float())
        functional.cross_entropy(logits, self.labels.flatten(), reduction="sum").backward()
        return hidden.grad


def _output_layer(options: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> Any:
    from megatron.core.tensor_parallel import ColumnParallelLinear
    from megatron.core.transformer import TransformerConfig

    config = TransformerConfig(
        num_layers=1,
        hidden_size=options.hidden,
        num_attention_heads=1,
        params_dtype=dtype,
        perform_initialization=False,
        gradient_accumulation_fusion=False,
    )
    return ColumnParallelLinear(
        options.hidden, options.vocabulary, config=config, init_method=torch.nn.init.normal_, bias=False
    ).to(device)


def measure(head: Head, tiles: int | None, exact: Tensor, options: argparse.Namespace) -> Iterator[tuple[str, ...]]:
    """One number of tiles; None for PyTorch's function.

    Raises:
        LeftOut: this PyTorch has no chunked function.
    """
    if tiles is None and not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        raise LeftOut(f"torch {torch.__version__} has no LinearCrossEntropyOptions")
    work: Callable[[], Tensor] = head.of_pytorch if tiles is None else partial(head.tiled, tiles)
    error = float(relative_error(work(), exact))
    allowed = ALLOWED * float(relative_error(head.tiled(1), exact))
    seconds = medians({"": work}, head.device, options.repeats)[""]
    peak = f"{added_bytes(work) / _MIB:.0f}" if head.device.type == "cuda" else "-"
    yield f"{1e3 * seconds:.1f}", peak, f"{error:.2e}", "ok" if tiles is None or error <= allowed else "over"


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print and save; 1 if tiles have a larger error."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add_options(parser)
    parser.add_argument("--tokens", type=int, default=16384, help="tokens per rank (default: 16384)")
    parser.add_argument("--hidden", type=int, default=4096, help="hidden size (default: 4096)")
    parser.add_argument("--vocabulary", type=int, default=128256, help="vocabulary (default: 128256)")
    options = parser.parse_args(argv)
    if options.smoke:
        options.tokens, options.hidden, options.vocabulary, options.repeats = 128, 64, 512, 1
    _start(device_of(options))
    head = Head(options)
    exact = head.exact()
    rows = Rows("loss-tiles", ("head", "tokens"), ("ms", "added MiB", "error"), options)
    for tiles in (1, 4, 16, None):
        name = "PyTorch" if tiles is None else f"{tiles} tiles" if tiles > 1 else "all tokens"
        rows.measure((name, options.tokens), partial(measure, head, tiles, exact, options))
    code = rows.close()
    dist.destroy_process_group()
    return code


def _start(device: torch.device) -> None:
    """Make Megatron's groups of one rank."""
    from megatron_wallfacer.megatron import any_device, cpu_runtime

    if device.type == "cpu":
        cpu_runtime.install()
    any_device.install()
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    dist.init_process_group("gloo" if device.type == "cpu" else "nccl", store=dist.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)


if __name__ == "__main__":
    sys.exit(main())
