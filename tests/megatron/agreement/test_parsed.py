"""Arguments as ranks compare them: twelve kinds of disagreement and what is none."""

from __future__ import annotations

import signal
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_wallfacer.engine.agreement.compare import compare
from megatron_wallfacer.megatron.agreement import start
from megatron_wallfacer.megatron.agreement.start import Parsed, record_of
from megatron_wallfacer.megatron.flags import Flags
from megatron_wallfacer.megatron.settings import Settings
from megatron_wallfacer.schedule.schemes import make_plan

SETTINGS = Settings(make_plan("ring", 4), Flags(kernel="reference"))
ARGS: dict[str, Any] = {
    "wallfacer_cp_size": 4,
    "wallfacer_head_groups": 1,
    "wallfacer_transfers": "direct",
    "wallfacer_timeline": None,
    "wallfacer_log_metrics": False,
    "wallfacer_cluster": None,
    "nccl_communicator_config_path": None,
    "window_size": (100, 0),
    "bf16": True,
    "lr": 1e-3,
    "data_path": ["0.3", "/data/a", "0.7", "/data/b"],
    "save": "checkpoints",
    "exit_signal": signal.SIGTERM,
    "params_dtype": torch.bfloat16,
    "rank": 0,
    "local_rank": 0,
    "q_lora_rank": None,
    "object": object(),
    "distributed_timeout_minutes": 10,
}


@pytest.fixture(autouse=True)
def software(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """What :mod:`software` finds, without looking for it."""
    found = {"torch of commit": "aaa", "transformer-engine": "2.8"}
    monkeypatch.setattr(
        start.software, "code", lambda: {name: found[name] for name in ("torch of commit", "transformer-engine")}
    )
    monkeypatch.setattr(start.software, "labels", lambda version: {"torch": found.get("label", "2.14")})
    return found


def verdict(odd: int, settings: Settings | None = SETTINGS, **changed: Any) -> tuple[list[str], list[str]]:
    """Errors and warnings where one of four ranks has other arguments."""
    plain = record_of(Parsed.of(Namespace(**ARGS)), SETTINGS, (0, 19, 2))
    other = record_of(Parsed.of(Namespace(**(ARGS | changed))), settings, (0, 19, 2))
    found = compare({rank: other if rank == odd else plain for rank in range(4)})
    return list(found.errors), list(found.warnings)


@pytest.mark.parametrize("odd", [0, 3])
@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"wallfacer_head_groups": 2}, "--wallfacer-head-groups 2"),
        ({"wallfacer_transfers": "staged"}, "--wallfacer-transfers staged"),
        ({"wallfacer_timeline": "lines"}, "--wallfacer-timeline PATH"),
        ({"wallfacer_log_metrics": True}, "--wallfacer-log-metrics,"),
        ({"window_size": (200, 0)}, "--window-size 200,0"),
        ({"bf16": False}, "no --bf16"),
        ({"lr": 2e-3}, "--lr 0.002"),
        ({"save": None}, "no --save"),
        ({"data_path": ["0.4", "/data/a", "0.7", "/data/b"]}, "--data-path 0.4 PATH 0.7 PATH"),
        ({"exit_signal": signal.SIGUSR2}, "--exit-signal SIGUSR2"),
        ({"params_dtype": torch.float16}, "--params-dtype torch.float16"),
        ({"q_lora_rank": 8}, "--q-lora-rank 8"),
        ({"added_by_a_fork": 1}, "--added-by-a-fork 1"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_different_argument_is_an_error(odd: int, changed: dict, words: str) -> None:
    errors, warnings = verdict(odd, **changed)
    (line,) = errors
    assert line.startswith(f"rank {odd} has {words}")
    assert not [line for line in warnings if words.split()[0] not in line]


@pytest.mark.parametrize("changed", [{"rank": 3, "local_rank": 3}, {"object": object()}])
def test_what_differs_by_nature_is_equal(changed: dict) -> None:
    assert verdict(1, **changed) == ([], [])


@pytest.mark.parametrize(
    ("changed", "line"),
    [
        ({"save": "elsewhere"}, "rank 1 has --save elsewhere, ranks 0, 2, 3 have checkpoints"),
        (
            {"data_path": ["0.3", "/b/a", "0.7", "/b/b"]},
            "rank 1 has --data-path 0.3 /b/a 0.7 /b/b, ranks 0, 2, 3 have ",
        ),
    ],
)
def test_a_different_path_is_a_warning(changed: dict, line: str) -> None:
    errors, warnings = verdict(1, **changed)
    assert not errors
    assert warnings[0].startswith(line)


@pytest.mark.parametrize("name", ["wallfacer_cluster", "nccl_communicator_config_path"])
def test_files_are_compared_by_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    here, same, other = (tmp_path / folder / "c.yaml" for folder in "abc")
    for file, text in ((here, "x: 1"), (same, "x: 1"), (other, "x: 2")):
        file.parent.mkdir()
        file.write_text(text)
    monkeypatch.setitem(ARGS, name, str(here))
    flag = f"--{name.replace('_', '-')}"
    assert verdict(1, **{name: str(same)})[0] == []
    (line,), _ = verdict(1, **{name: str(other)})
    assert line.startswith(f"rank 1 has {flag} with a file of SHA-256 ")


def test_the_resolved_plan_is_compared_where_arguments_are_equal() -> None:
    """As where a file on one node is another, or a planner chose otherwise."""
    errors, _ = verdict(2, Settings(make_plan("mesh", 4), Flags(kernel="reference", keep_gathered_q=True)))
    assert any(line.startswith("rank 2 has resolved plan grid ") for line in errors)
    assert "rank 2 has resolved keep_gathered_q True, ranks 0, 1, 3 have False" in errors


def test_software(software: dict[str, str]) -> None:
    plain = record_of(Parsed.of(Namespace(**ARGS)), SETTINGS, (0, 19, 2))
    software["label"] = "2.14+local"
    other = record_of(Parsed.of(Namespace(**ARGS)), SETTINGS, (0, 19, 2))
    assert compare({0: plain, 1: other}).errors == ()
    assert compare({0: plain, 1: other}).warnings == ("rank 1 has torch 2.14+local, rank 0 has 2.14",)
    software["transformer-engine"] = "2.9"
    other = record_of(Parsed.of(Namespace(**ARGS)), SETTINGS, (0, 19, 2))
    assert "rank 1 has transformer-engine 2.9, rank 0 has 2.8" in compare({0: plain, 1: other}).errors


def test_a_rank_without_the_plugin_is_compared() -> None:
    errors, _ = verdict(1, None, wallfacer_cp_size=None)
    assert errors == ["rank 1 has no --wallfacer-cp-size, ranks 0, 2, 3 have 4"]
