"""What a CPU needs is added and said; what only CUDA can do is rejected by name."""

import pytest

from megatron_wallfacer.errors import WallfacerError
from megatron_wallfacer.megatron.cpu_runtime import adapt_argv


def test_what_is_missing_is_appended_and_reported() -> None:
    argv, added = adapt_argv(["--seq-length", "128"])
    assert argv[:2] == ["--seq-length", "128"]
    assert argv[2:] == added
    assert added[added.index("--transformer-impl") + 1] == "local"
    assert added[added.index("--distributed-backend") + 1] == "gloo"


def test_what_the_user_said_is_left_alone() -> None:
    _, added = adapt_argv(["--transformer-impl=local", "--eval-interval", "7"])
    assert "--transformer-impl" not in added
    assert "--eval-interval" not in added


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--distributed-backend", "nccl"], "--distributed-backend nccl needs CUDA.*gloo"),
        (["--transformer-impl=transformer_engine"], "--transformer-impl transformer_engine needs CUDA.*local"),
        (["--fp8-format", "hybrid"], "--fp8-format hybrid needs CUDA"),
        (["--use-flash-attn"], "--use-flash-attn needs CUDA"),
    ],
)
def test_cuda_only_is_rejected_in_one_line(argv: list[str], said: str) -> None:
    with pytest.raises(WallfacerError, match=said) as error:
        adapt_argv(argv)
    assert "\n" not in str(error.value)
