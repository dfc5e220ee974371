"""Our flags in Megatron's real parser: what turns the plugin on, and what each flag resolves to."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator

import pytest
import torch

from megatron_wallfacer.errors import WallfacerError
from megatron_wallfacer.megatron import arguments
from megatron_wallfacer.megatron.hooks import Hooks
from megatron_wallfacer.megatron.session import Session
from megatron_wallfacer.megatron.version import megatron_version
from megatron_wallfacer.schedule.grid import RINGS_ADJACENT

MODEL = "--num-layers 2 --hidden-size 64 --num-attention-heads 8 --seq-length 1024 --micro-batch-size 1".split()

ON = ("--wallfacer-cp-size", "8")

Parse = Callable[..., Session]


@pytest.fixture
def parse(monkeypatch: pytest.MonkeyPatch) -> Iterator[Parse]:
    """``parse(*flags)``: parse as Megatron does, with the hooks installed; the session they filled in."""
    hooks = Hooks(Session(megatron_version(), torch.device("cpu")))
    hooks.install()

    def run(*flags: str) -> Session:
        from megatron.training.arguments import add_megatron_arguments

        monkeypatch.setenv("WORLD_SIZE", "8")
        argv = [*MODEL, "--attention-dropout", "0", *flags]
        monkeypatch.setattr("sys.argv", ["pretrain_gpt.py", *argv])
        parser = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
        hooks.session.args = parser.parse_args()
        return hooks.session

    yield run
    hooks.uninstall()


def test_auto_sees_the_heads_that_tensor_parallelism_leaves(parse: Parse) -> None:
    """One kv head of eight is shared by all tensor-parallel ranks: with two q heads at hand kappa is 1/2, not 1/8."""
    flags = "--tensor-model-parallel-size 4 --wallfacer-cp-size 2 --group-query-attention --num-query-groups 1"
    assert arguments.heads_at_hand(parse(*flags.split()).args) == (2, 1)


def test_a_size_that_only_a_checkpoint_knows_leaves_the_head_dim_open() -> None:
    assert arguments.head_dim(argparse.Namespace(kv_channels=None, hidden_size=None)) is None


def test_without_the_flag_only_the_parser_is_touched(parse: Parse) -> None:
    session = parse()
    assert session.settings is None
    assert session.hooks == ["arguments"]
    assert session.args.context_parallel_size == 1


def test_the_flag_sets_megatrons_own_and_installs_every_hook(parse: Parse) -> None:
    session = parse("--wallfacer-cp-size", "8")
    assert session.args.context_parallel_size == 8
    assert len(session.hooks) == 6
    assert session.settings.plan.grid.cp_size == 8


def test_equals_and_both_orders_of_an_agreeing_size_are_fine(parse: Parse) -> None:
    assert parse("--context-parallel-size=4", "--wallfacer-cp-size=4").settings is not None
    assert parse("--wallfacer-cp-size", "4", "--context-parallel-size", "4").settings is not None


def test_each_flag_reaches_the_plan(parse: Parse) -> None:
    flags = "--wallfacer-cp-size 8 --wallfacer-scheme wallfacer --wallfacer-team-size 2 --wallfacer-kernel reference"
    settings = parse(*flags.split(), "--wallfacer-placement", "rings-adjacent", "--wallfacer-keep-gathered-q").settings
    grid = settings.plan.grid
    assert (grid.team, grid.kv_team, grid.ring, grid.placement) == (2, 2, 2, RINGS_ADJACENT)
    assert (settings.plan.backward, settings.kernel, settings.keep_gathered_q) == ("q", "reference", True)


def test_auto_knows_grouped_queries(parse: Parse) -> None:
    """kappa = 1/8 makes K and V so cheap that the queries should not move."""
    mha = parse("--wallfacer-cp-size", "8").settings.plan.grid
    gqa = parse("--wallfacer-cp-size", "8", "--group-query-attention", "--num-query-groups", "1").settings.plan.grid
    assert mha.team > gqa.team == 1


def test_our_other_flags_need_the_one_that_turns_it_on(parse: Parse) -> None:
    with pytest.raises(WallfacerError, match=r"--wallfacer-team-size 2: needs --wallfacer-cp-size"):
        parse("--wallfacer-team-size", "2")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--wallfacer-cp-size 0", r"--wallfacer-cp-size 0: must be a positive number"),
        ("--wallfacer-cp-size two", r"--wallfacer-cp-size two: must be a whole number"),
        ("--wallfacer-team-size 1.5", r"--wallfacer-team-size 1.5: must be a whole number"),
        ("--wallfacer-scheme nonsense", r"--wallfacer-scheme nonsense: must be one of auto, "),
        ("--wallfacer-scheme usp", r"--wallfacer-scheme usp: .*not built yet"),
        ("--wallfacer-team-size 3", r"--wallfacer-team-size 3: must be a divisor of cp size 8"),
        (
            "--wallfacer-cp-size 8 --wallfacer-team-size 4 --wallfacer-kv-team-size 4",
            r"--wallfacer-kv-team-size 4: must",
        ),
        (
            "--wallfacer-cp-size 8 --wallfacer-scheme wallfacer --wallfacer-team-size 4",
            r"--wallfacer-team-size 4: .*C\^2",
        ),
        (
            "--wallfacer-cp-size 8 --wallfacer-scheme ring --wallfacer-team-size 2",
            r"--wallfacer-team-size 2: must be 1",
        ),
        ("--wallfacer-head-size 2", r"--wallfacer-head-size 2: must be 1; it is not built yet"),
        ("--wallfacer-ring-window 2", r"--wallfacer-ring-window 2: must be 1; .*not built yet"),
        (
            "--wallfacer-cp-size 8 --wallfacer-cluster c.yaml",
            r"--wallfacer-cluster c.yaml: must be left out; .*not built",
        ),
        (
            "--wallfacer-cp-size 8 --wallfacer-placement sideways",
            r"--wallfacer-placement sideways: must be an order of",
        ),
        ("--wallfacer-backward q", r"--wallfacer-backward q: .*not built yet"),
        ("--wallfacer-backward both", r"--wallfacer-backward both: must be auto, kv or q"),
        ("--wallfacer-kernel te", r"--wallfacer-kernel te: .*not built yet"),
        ("--wallfacer-kernel magic", r"--wallfacer-kernel magic: must be one of auto, "),
    ],
)
def test_a_bad_value_is_one_line_with_flag_value_and_what_is_allowed(parse: Parse, flags: str, message: str) -> None:
    with pytest.raises(WallfacerError, match=message) as error:
        parse(*ON, *flags.split())
    assert "\n" not in str(error.value)
