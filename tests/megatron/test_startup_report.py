"""The startup report is made of sentences, with units, for every kind of line."""

from __future__ import annotations

import re

import pytest

from megatron_wallfacer.engine.groups import AxisGroups
from megatron_wallfacer.megatron import startup_report
from tests.megatron.test_arguments import Parse, parse  # noqa: F401

NODES = ("a",) * 4 + ("b",) * 4


@pytest.fixture(autouse=True)
def no_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(startup_report, "groups_text", lambda _: "The rank is in no process group.")


def report(parse: Parse, flags: str) -> dict[str, str]:  # noqa: F811
    """Return the report of a job of two nodes by label."""
    state = parse("--wallfacer-cp-size", "8", *flags.split())
    state.axis_groups = [AxisGroups(state.settings.plan.grid, 0, tuple(range(8)), NODES, {}, backend="gloo")]
    lines = startup_report.startup_report(state).splitlines()
    return dict(re.fullmatch(r"wallfacer: (\S.*?) {2,}(.+)", line).groups() for line in lines)


@pytest.mark.parametrize(
    ("flags", "label", "text"),
    [
        ("--wallfacer-scheme ring", "grid", "The grid of 8 context-parallel ranks is ring_outer 8."),
        (
            "--wallfacer-scheme ring",
            "forward",
            r"K and V are passed around the ring (pass-kv). \S+ KiB in 7 messages are",
        ),
        ("--wallfacer-scheme tokenring", "forward", r"Q is passed around the ring (pass-q). "),
        ("--wallfacer-scheme ring --wallfacer-bidirectional", "scheme", "in both directions."),
        ("--wallfacer-scheme ulysses", "forward", "the lower bound for undivided heads."),
        ("--wallfacer-scheme usp --wallfacer-head-groups 8", "heads", "because they do not divide into 8."),
        ("--wallfacer-transfers staged", "transfers", "through host memory"),
        ("--wallfacer-cuda-graphs", "cuda graphs", "hold"),
        ("--wallfacer-cluster emulated-c-4x4", "planned", "the cluster emulated-c-4x4."),
        ("--window-size 128,0 --wallfacer-scheme ring", "window", "attends to 128 tokens before its own."),
        ("--window-size 128,0 --wallfacer-scheme ring", "window forward", "each rank receives only the chunks"),
        ("--window-size 128,0 --wallfacer-window-scheme mesh", "window scheme", "The scheme is mesh"),
        ("--sft", "documents", "Each document of a packed sequence is split."),
        (
            "--dataloader-inter-document-masking --no-rope-fusion",
            "documents",
            "The packed sequence is split as a whole.",
        ),
    ],
)
def test_every_kind_of_line(parse: Parse, flags: str, label: str, text: str) -> None:  # noqa: F811
    lines = report(parse, flags)
    assert re.search(re.escape(text).replace(r"\\S\+", r"\S+"), lines[label]), lines[label]
    for line in lines.values():
        for sentence in re.split(r"(?<=\.) ", line):
            assert sentence[0].isupper() or sentence[0].isdigit(), line
            assert sentence.endswith("."), line
