"""The model that the Megatron tests train, and how two runs of it are compared."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from megatron_wallfacer.megatron.version import megatron_version
from megatron_wallfacer.training_runs.corpus import build_corpus, tokenizer_arguments
from tests.support.megatron_runs import RunResult, train

ITERATIONS = 20
LOSS_TOLERANCE = 1e-5
GRAD_NORM_TOLERANCE = 1e-4

#: GQA, RoPE, RMSNorm, SwiGLU, as in the demonstration, but smaller.
MODEL = (
    "--num-layers 2 --hidden-size 64 --ffn-hidden-size 128 --num-attention-heads 4 "
    "--group-query-attention --num-query-groups 2 --position-embedding-type rope --normalization RMSNorm --swiglu "
    "--disable-bias-linear --seq-length 256 --max-position-embeddings 256 --micro-batch-size 1 --global-batch-size 2 "
    "--lr 2e-3 --lr-decay-style constant --clip-grad 1.0 --seed 1234 --hidden-dropout 0 "
    "--split 98,2,0 --eval-iters 0 --log-interval 1"
).split()


@cache
def corpus() -> Path:
    """The demonstration's data, built once a machine."""
    return build_corpus(Path(__file__).resolve().parents[2] / "runs" / "corpus")


def arguments(*flags: str, iterations: int = ITERATIONS) -> list[str]:
    """A full command line; later flags win."""
    data = ["--data-path", str(corpus()), *tokenizer_arguments(megatron_version()[:2])]
    return [*MODEL, "--attention-dropout", "0", *data, "--train-iters", str(iterations), *flags]


@cache
def baseline(*flags: str, ranks: int = 1) -> RunResult:
    """Megatron without the plugin, context-parallel size 1."""
    return train(ranks, arguments(*flags)).check()


def differences(run: RunResult, reference: RunResult) -> tuple[float, float]:
    """As :func:`largest_differences`, of two runs of full length."""
    assert len(run.iterations) == len(reference.iterations) == ITERATIONS
    return largest_differences(run, reference)


def largest_differences(run: RunResult, reference: RunResult) -> tuple[float, float]:
    """Largest relative difference over the iterations: (loss, gradient norm)."""

    def largest(got: list[float], want: list[float]) -> float:
        return max(abs(a - b) / abs(b) for a, b in zip(got, want, strict=True))

    return largest(run.losses, reference.losses), largest(run.grad_norms, reference.grad_norms)
