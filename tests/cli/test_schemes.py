"""The list of schemes is what the schedules count, and the documentation shows what the command prints."""

import json
import re
from pathlib import Path

import pytest

from megatron_wallfacer.cli.main import main
from megatron_wallfacer.schedule.schemes import SCHEMES

PAGE = (Path(__file__).parents[2] / "docs" / "schemes.md").read_text()
SHOWN = re.findall(r"^```\n\$ wallfacer (.*)\n([^`]*)^```$", PAGE, flags=re.MULTILINE)
NAMES = set(SCHEMES) - {"auto"}


def found(capsys: pytest.CaptureFixture[str], *flags: str) -> dict[str, dict]:
    assert main(["schemes", *flags, "--json"]) == 0
    return {row["scheme"]: row for row in json.loads(capsys.readouterr().out)}


def test_the_page_shows_two_examples() -> None:
    assert len(SHOWN) == 2


@pytest.mark.parametrize(("command", "output"), SHOWN)
def test_the_page_shows_what_the_command_prints(capsys: pytest.CaptureFixture[str], command: str, output: str) -> None:
    assert main(command.split()) == 0
    assert capsys.readouterr().out == output, f"put the output of 'wallfacer {command}' into docs/schemes.md"


def test_every_scheme_is_in_the_list_and_on_the_page(capsys: pytest.CaptureFixture[str]) -> None:
    assert set(found(capsys)) == NAMES
    systems, costs = (
        set(re.findall(r"^\| `([a-z-]+)` \|", table, flags=re.MULTILINE))
        for table in re.split(r"^\| name \| grid \|", PAGE, flags=re.MULTILINE)
    )
    assert costs == systems == NAMES


def test_known_figures(capsys: pytest.CaptureFixture[str]) -> None:
    rows = found(capsys, "--cp-size", "16", "--q-heads", "8", "--kv-heads", "8")
    assert (rows["team-ring"]["forward_volume"], rows["team-ring"]["backward_volume"]) == (12, 21)
    assert (rows["wallfacer"]["forward_volume"], rows["wallfacer"]["backward_volume"]) == (20, 31)
    assert (rows["ring"]["forward_messages"], rows["ring"]["backward_messages"]) == (15, 30)
    # Sixteen K and V shards of which the rank's own are copied too, and fp32 output: no less than 15 x 2 + 2.
    assert rows["all-gather"]["forward_buffers"] >= 32
    same = {key: value for key, value in rows["lss"].items() if key != "scheme"}
    assert same == {key: value for key, value in rows["all-gather"].items() if key != "scheme"}


def test_ring_variants_are_named_where_there_is_a_ring(capsys: pytest.CaptureFixture[str]) -> None:
    rows = found(capsys, "--cp-size", "16", "--q-heads", "8", "--kv-heads", "8")
    assert {name: rows[name]["ring_variants"] for name in ("ring", "tokenring", "burst", "wallfacer", "mesh")} == {
        "ring": "pass-kv, pass-kv",
        "tokenring": "pass-q, pass-q",
        "burst": "pass-kv, pass-q",
        "wallfacer": "pass-kv, pass-q",
        "mesh": "-",
    }


def test_a_scheme_that_cannot_divide_the_heads_has_no_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    row = found(capsys, "--cp-size", "16", "--q-heads", "8", "--kv-heads", "8")["ulysses"]
    assert row["grid"] == "heads do not divide"
    assert row["forward_volume"] is row["backward_messages"] is row["forward_buffers"] is None


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--cp-size 0", "cp_size=0: must be a positive number"),
        ("--kv-heads 3", "kv_heads=3: must be a divisor of 32 query heads"),
        ("--kv-heads 0", "kv_heads=0: must be a divisor of 32 query heads"),
        ("--q-heads 0", "q_heads=0: must be a positive number"),
    ],
)
def test_a_bad_value_is_one_line(capsys: pytest.CaptureFixture[str], flags: str, message: str) -> None:
    assert main(["schemes", *flags.split()]) == 2
    assert capsys.readouterr().err.startswith(f"wallfacer: error: {message}")
