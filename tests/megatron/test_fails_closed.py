"""Unsupported means: one line that names flag, value and what is allowed, on every rank, soon, and no hang.

The rules themselves are tested in test_unsupported.py and test_arguments.py; here whole runs end as they should.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_wallfacer.megatron.releases import SUPPORTED
from tests.megatron.training import arguments
from tests.support import machine
from tests.support.megatron_runs import REPOSITORY, SCRIPT, RunResult, train

LIMIT_S = 30

#: Flags beside --wallfacer-cp-size 2, and the line that every rank must print.
REJECTED = {
    "--context-parallel-size 4": "--context-parallel-size 4: must be 2",
    "--wallfacer-team-size 3": "--wallfacer-team-size 3: must be one of 1, 2 with scheme auto",
    "--wallfacer-team-size 2 --wallfacer-kv-team-size 2": "--wallfacer-kv-team-size 2: must be 1 with",
    "--wallfacer-scheme wallfacer --wallfacer-team-size 2": "--wallfacer-team-size 2: must be 1 with",
    "--tensor-model-parallel-size 2": "--wallfacer-cp-size 2 on 2 ranks, tensor- times pipeline-parallel size 2: must",
    "--wallfacer-scheme nonsense": "--wallfacer-scheme nonsense: must be one of",
    "--wallfacer-head-size 4": "--wallfacer-head-size 4: must be one of 1, 2 with scheme auto",
    "--num-attention-heads 3 --num-query-groups 3 --wallfacer-head-size 2": (
        "--wallfacer-head-size 2: must be one of 1, 3 for 3 query and 3 kv heads"
    ),
    "--wallfacer-ring-inner-size 4": "--wallfacer-ring-inner-size 4: must be one of 1, 2 with scheme auto",
    "--wallfacer-kernel te": "--wallfacer-kernel te: must be auto or reference here, because te cannot",
    "--seq-length 254": "--seq-length 254: must be a multiple of 2 x --wallfacer-cp-size 2, because",
    "--attention-dropout 0.1": "--attention-dropout 0.1: must be 0",
    "--window-size 64": "--window-size 64: must be LEFT,RIGHT",
    "--qk-clip": "--qk-clip: must be left out",
    "--position-embedding-type relative": "--position-embedding-type relative: must be",
    "--reset-attention-mask": "--reset-attention-mask: must be left out",
    "--cp-comm-type a2a": "--cp-comm-type a2a: must be left out",
    "--hierarchical-context-parallel-sizes 1 2": "--hierarchical-context-parallel-sizes 1 2: must be left out",
    "--hybrid-context-parallel": "--hybrid-context-parallel: must be left out",
    "--yaml-cfg job.yaml": "--yaml-cfg job.yaml: must be left out",
    "--experimental-attention-variant gated_delta_net": "--experimental-attention-variant gated_delta_net: must be",
    "--transformer-impl transformer_engine": "--transformer-impl transformer_engine needs CUDA",
    "--distributed-backend nccl": "--distributed-backend nccl needs CUDA",
}


def check_rejected(run: RunResult, message: str) -> None:
    """Every rank ended by itself, in time, not with 0, and said it in one line without a traceback."""
    assert run.seconds < LIMIT_S
    for rank in run.ranks:
        assert rank.end == "ended", rank
        assert rank.exit_code == 2, rank.output
        errors = [line for line in rank.output.splitlines() if line.startswith("wallfacer: error: ")]
        assert len(errors) == 1, rank.output
        assert message in errors[0]
        assert "Traceback" not in rank.output


@pytest.mark.parametrize("flags", REJECTED)
def test_rejected_on_every_rank(flags: str) -> None:
    run = train(2, arguments("--wallfacer-cp-size", "2", *flags.split()), timeout_s=LIMIT_S)
    check_rejected(run, REJECTED[flags])


def test_our_flags_without_the_switch() -> None:
    run = train(2, arguments("--wallfacer-scheme", "ring"), timeout_s=LIMIT_S)
    check_rejected(run, "--wallfacer-scheme ring: needs --wallfacer-cp-size")


def test_a_layer_that_bypasses_the_hook() -> None:
    run = train(
        2, arguments("--wallfacer-cp-size", "2", "--spec", "tests.support.bypassing_spec", "spec"), timeout_s=LIMIT_S
    )
    check_rejected(run, "--wallfacer-cp-size: the plugin computes 0 of 2 attention layers, but not ForeignAttention")


def test_a_spec_that_names_megatrons_attention() -> None:
    flags = ("--wallfacer-cp-size", "2", "--spec", "tests.support.bypassing_spec", "named")
    run = train(2, arguments(*flags), timeout_s=LIMIT_S)
    check_rejected(run, "--wallfacer-cp-size: must be left out, because the model's script, or --spec, requires")


@pytest.mark.parametrize("size", [1, 2])
def test_a_cache_of_keys_and_values(size: int) -> None:
    """Before the first token: over several ranks a prompt would be computed wrongly, and decoding stops later."""
    script = REPOSITORY / "tests" / "support" / "generating.py"
    run = train(size, arguments("--wallfacer-cp-size", str(size)), script=script, timeout_s=LIMIT_S)
    check_rejected(run, f"layer 1: --wallfacer-cp-size {size}: must be left out to generate")


def test_another_patch_in_our_place(tmp_path: Path) -> None:
    """Somebody replaces the provider's method after us: context parallelism would be quietly off."""
    script = tmp_path / "patched.py"
    script.write_text(
        "import runpy\n"
        "from megatron.training import arguments\n"
        "parse = arguments.parse_args\n"
        "def parse_args(*args, **kwargs):\n"
        "    parsed = parse(*args, **kwargs)\n"
        "    from megatron.core.models.backends import LocalSpecProvider\n"
        "    LocalSpecProvider.core_attention = lambda self: None\n"
        "    return parsed\n"
        "arguments.parse_args = parse_args\n"
        f"runpy.run_path({str(SCRIPT)!r}, run_name='__main__')\n"
    )
    run = train(2, arguments("--wallfacer-cp-size", "2"), script=script, timeout_s=LIMIT_S)
    check_rejected(run, "LocalSpecProvider.core_attention no longer belongs to the plugin")


def launch(*argv: str, ranks: int = 2) -> tuple[int, str, bool]:
    """(exit code, output, whether it ended in time) of the real thing under torchrun."""
    limit, started = machine.time_limit(LIMIT_S), time.monotonic()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    done = subprocess.run(
        [*command, "-m", "megatron_wallfacer", *argv],
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=4 * LIMIT_S,
    )
    seconds = time.monotonic() - started
    return done.returncode, done.stdout + done.stderr, seconds < limit()


def our_errors(output: str) -> list[str]:
    return re.findall(r"^wallfacer: error: .*$", output, flags=re.MULTILINE)


@pytest.mark.alone
def test_a_script_that_does_not_exist() -> None:
    code, output, in_time = launch("/no/such/pretrain_gpt.py", "--wallfacer-cp-size", "2")
    assert code != 0
    assert in_time
    assert our_errors(output) == [
        "wallfacer: error: /no/such/pretrain_gpt.py is not a file; "
        "give the path of pretrain_gpt.py in a Megatron-LM checkout"
    ]


@pytest.mark.alone
def test_an_unsupported_megatron(tmp_path: Path) -> None:
    """A checkout beside the script wins over the installed package, so its version is the one that counts."""
    core = tmp_path / "megatron" / "core"
    core.mkdir(parents=True)
    (core / "__init__.py").touch()
    (core / "package_info.py").write_text("MAJOR = 0\nMINOR = 12\nPATCH = 3\n")
    (tmp_path / "pretrain_gpt.py").write_text("raise SystemExit('the script ran')\n")
    code, output, in_time = launch(str(tmp_path / "pretrain_gpt.py"), "--wallfacer-cp-size", "2")
    assert code != 0
    assert in_time
    (error,) = our_errors(output)
    assert f"megatron-core 0.12.3 is not supported: use {SUPPORTED}" in error


@pytest.mark.alone
def test_under_torchrun_a_bad_flag_is_one_line_a_machine() -> None:
    code, output, in_time = launch(str(SCRIPT), *arguments("--wallfacer-cp-size", "2", "--reset-attention-mask"))
    assert code != 0
    assert in_time
    (error,) = our_errors(output)
    # torchrun's own summary has the line as well: its launcher writes the error file.
    assert error.removeprefix("wallfacer: error: ") in output.partition("Root Cause")[2]


@pytest.mark.alone
def test_under_torchrun_an_error_after_start_up_ends_every_rank() -> None:
    flags = ("--wallfacer-cp-size", "2", "--spec", "tests.support.bypassing_spec", "spec")
    code, output, in_time = launch(str(SCRIPT), *arguments(*flags))
    assert code != 0
    assert in_time
    assert our_errors(output)
