"""The script for a card: every part runs small on a CPU, and one that fails or hangs costs the others nothing."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import efficiency
from benchmarks.gpu.acceptance import Acceptance
from benchmarks.gpu.parts import Command, Part, parts
from benchmarks.gpu.tables import table_rows
from tests.support import machine

ROOT = Path(__file__).resolve().parents[3]
#: Parts that take as long as all others.
FIRST_HALF = ("schemes", "training")
#: In place of an interpreter: saves one row, then ends as the module's name says.
STUB = """#!/bin/sh
while [ $# -gt 0 ]; do
    case "$1" in -m) module=$2 ;; --out) out=$2 ;; --budget) budget=$2 ;; esac
    shift
done
if [ -n "$out" ]; then
    mkdir -p "$out"
    setting="budget $budget connections ${CUDA_DEVICE_MAX_CONNECTIONS-unset}"
    printf 'setting,verdict\\n%s,ok\\n' "$setting" >"$out/table.csv"
fi
case "$module" in
machine) echo "GPU: none" ;;
boom) printf 'starting\\nRuntimeError: the card is on fire\\n%s\\n' "$(seq 30)"; exit 1 ;;
hang) setsid sleep 300 & echo $! >"$out/pid"; wait ;;
esac
"""


def accept(tmp_path: Path, *commands: Command, seconds: float = 30.0) -> tuple[int, str]:
    """Exit code and page of one part per command."""
    python = tmp_path / "python"
    python.write_text(STUB)
    python.chmod(0o755)
    chosen = [Part(command.name, command.name.title(), (command,)) for command in commands]
    code = Acceptance(chosen, tmp_path / "out", seconds, 1.0, str(python), "a card").run()
    return code, (tmp_path / "out" / "results.md").read_text()


def alive(pid: int) -> bool:
    """Whether a process runs; one that ended and was not waited for does not."""
    try:
        return (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_part_that_fails_is_reported_and_the_others_are_there(tmp_path: Path) -> None:
    code, page = accept(tmp_path, Command("first", "fine"), Command("second", "boom"), Command("third", "fine"))
    assert code == 1
    lines = {line.split(" | ")[1]: line for line in page.splitlines() if line.startswith("| ")}
    assert "| ok | 1 ok |" in lines["first"]
    assert "| exit code 1 | 1 ok |" in lines["second"]
    assert "| ok | 1 ok |" in lines["third"]
    section = page.partition("## Second")[2].partition("## Third")[0]
    # The first line that names an error, though it is not among the last.
    assert "    RuntimeError: the card is on fire\n    ...\n" in section
    assert "starting" not in section
    assert "RuntimeError" in (tmp_path / "out" / "logs" / "second.log").read_text()


def test_a_part_that_hangs_is_killed_with_all_that_it_started(tmp_path: Path) -> None:
    begin = time.monotonic()
    code, page = accept(tmp_path, Command("first", "hang", share=1), Command("second", "fine", share=4), seconds=6.0)
    assert code == 1
    assert time.monotonic() - begin < 30
    assert "| killed after 1 s | 1 ok |" in page
    assert page.count("| ok | 1 ok |") == 1
    # It has a session of its own, as the ranks of torchrun have.
    assert not alive(int((tmp_path / "out" / "first" / "pid").read_text()))


def test_the_page_is_whole_after_every_command(tmp_path: Path) -> None:
    """A run that is killed in its second command has the first on its page, and the others as not run."""
    out = tmp_path / "out"
    started = "\n".join(
        (
            "from tests.benchmarks.gpu.test_acceptance import *",
            f"accept(Path({str(tmp_path)!r}), Command('a', 'fine'), Command('b', 'hang'), Command('c', 'fine'))",
        )
    )
    process = subprocess.Popen([sys.executable, "-c", started], cwd=ROOT, start_new_session=True)
    try:
        while not (out / "b" / "pid").exists():
            assert process.poll() is None
            time.sleep(0.05)
    finally:
        process.kill()
        process.wait()
        os.kill(int((out / "b" / "pid").read_text()), 9)
    page = (out / "results.md").read_text()
    assert "| A | a |" not in page
    lines = [line for line in page.splitlines() if line.startswith("| ")]
    assert [line.split(" | ")[2] for line in lines[2:5]] == ["ok", "not run", "not run"]
    assert "budget" in page.partition("## A")[2]


def test_time_that_one_part_does_not_need_goes_to_the_next(tmp_path: Path) -> None:
    commands = (Command("a", "fine", share=30, variables={"CUDA_DEVICE_MAX_CONNECTIONS": "1"}), Command("b", "fine"))
    accept(tmp_path, *commands, seconds=100.0)
    rows = [table_rows(tmp_path / "out" / name / "table.csv")[0]["setting"].split() for name in "ab"]
    budgets = [float(row[1]) for row in rows]
    # Limits of 50 and nearly 100 s, without the time of the start.
    assert budgets[0] == 30
    assert 75 <= budgets[1] <= 80
    assert rows[0][3] == "1"


def test_connections_are_unset_once() -> None:
    (schemes, *_) = parts(smoke=False)
    assert [dict(one.variables) for one in schemes.commands] == [
        {"CUDA_DEVICE_MAX_CONNECTIONS": "1"},
        {"CUDA_DEVICE_MAX_CONNECTIONS": None},
    ]
    assert [one.ranks for one in parts(smoke=False)[-1].commands] == [4, 2, 8]


def run_script(*argv: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(ROOT / "scripts" / "gpu_acceptance.sh"), *argv]
    variables = {"WALLFACER_PYTHON": sys.executable} | environment
    return subprocess.run(command, env=os.environ | variables, capture_output=True, text=True, timeout=660, check=False)


@pytest.mark.alone
def test_every_part_runs_small_on_a_cpu(tmp_path: Path) -> None:
    """Two halves of the script side by side, each with a processor of its own."""
    names = [part.name for part in parts(smoke=True)]
    halves = [[name for name in names if (name in FIRST_HALF) == first] for first in (True, False)]
    limit = machine.time_limit(180)
    begin = time.monotonic()
    with ThreadPoolExecutor() as threads:
        done = list(threads.map(lambda half: smoke(tmp_path / half[0], half), halves))
    assert time.monotonic() - begin < limit()
    for half, (code, page) in zip(halves, done, strict=True):
        assert code == 0, page
        lines = [line.split(" | ") for line in page.splitlines() if line.startswith("| ")]
        commands = [one.name for part in parts(smoke=True) if part.name in half for one in part.commands]
        assert [(line[1], line[2]) for line in lines[2 : 2 + len(commands)]] == [(name, "ok") for name in commands]
    out = {name: tmp_path / half[0] for half in halves for name in half}
    for name in ("schemes-one-connection", "schemes-unset-connections"):
        (schemes,) = (table_rows(path) for path in (out["schemes"] / name).glob("*.csv"))
        assert schemes[-1]["scheme"] == "teardown"
        assert {row["verdict"] for row in schemes[1:]} == {"ok"}
    training = out["training"] / "training"
    trained = {row["run"]: row["verdict"] for row in table_rows(training / "parity.csv")}
    assert trained["cp 2, team-ring"] == trained["tp 2 x cp 2"] == "ok"
    assert (training / "parity" / "megatron-s-layers-tp-2-x-cp-2.log").stat().st_size > 1000
    job = table_rows(out["job"] / "job" / "jobs.csv")
    assert [row["verdict"] for row in job if row["run"].startswith("usual job, ")] == ["ok", "ok"]
    graphs = table_rows(out["graphs"] / "graph-schemes" / "graph-schemes-2.csv")
    assert {row["own, largest difference"] for row in graphs if row["verdict"] == "ok"} == {"0.0e+00"}
    assert {row["verdict"] for row in graphs if row["scheme"] in ("team-ring", "ring", "ulysses")} == {"ok"}
    tiles = table_rows(out["graphs"] / "graph-tiles" / "graph-tiles.csv")
    assert {row["tile"] for row in tiles if row["verdict"] == "ok"} >= {"causal", "full", "wide", "tall", "window"}
    check_speed(out["speed"])
    host = table_rows(out["activations"] / "on-host" / "on-host.csv")
    assert [row["verdict"] for row in host] == ["ok: not measured"] * 3
    step = table_rows(out["activations"] / "step" / "step.csv")
    assert {row["verdict"] for row in step} == {"ok: not measured"}
    peers = table_rows(out["peers"] / "peers-2" / "peers-2.csv")
    assert {row["verdict"] for row in peers if row["contender"].startswith(("auto", "stand-in for te p2p"))} == {"ok"}


def check_speed(out: Path) -> None:
    """Tables of the part that measures speed and memory, and its profile."""
    timed = table_rows(out / "efficiency" / "efficiency.csv")
    assert [row["scheme"] for row in timed] == list(efficiency.SCHEMES) * 2
    assert all(float(row[name]) > 0 for row in timed for name in ("forward", "backward", "forward host ms"))
    tiles = [row for row in table_rows(out / "tiles" / "tiles.csv") if row["kernel"] in ("cudnn", "torch")]
    assert [(row["kernel"], row["mask"]) for row in tiles] == [("cudnn", "all"), ("torch", "full"), ("torch", "causal")]
    assert tiles[0]["verdict"].startswith("left out: kernel=cudnn")
    assert float(tiles[1]["backward host us"]) > 0
    memory = table_rows(out / "memory" / "memory.csv")
    assert len(memory) == 2 * len(efficiency.SCHEMES)
    assert all(row["verdict"] == "not measured" and float(row["counted MiB"]) > 0 for row in memory)
    trace = (out / "gaps" / "profile-p8-2k.json").read_text()
    shown = ("forward pass", "backward pass", "step 2: ")
    assert all(f"wallfacer: {words}" in trace for words in shown)
    assert all(words in trace for words in (": causal 0:2 x 0:2", ": full 1:2 x 0:2"))
    assert (out / "gaps" / "profile-p8-2k.svg").stat().st_size > 1000


def smoke(out: Path, chosen: Sequence[str]) -> tuple[int, str]:
    """Exit code and page of some parts."""
    only = (word for name in chosen for word in ("--only", name))
    done = run_script("--smoke", *only, "--out", str(out))
    return done.returncode, (out / "results.md").read_text()


def test_one_part_alone_and_the_list() -> None:
    listed = run_script("--list").stdout.split("\n")
    assert [line.split()[0] for line in listed if line] == [part.name for part in parts(smoke=False)]
    done = run_script("--only", "speeed")
    assert done.returncode == 2
    assert (
        "--only speeed: must be one of schemes, training, job, accuracy, graphs, speed, activations, peers"
        in done.stderr
    )


def test_the_script_wants_a_gpu() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    done = run_script()
    assert done.returncode == 2
    assert "PyTorch finds no GPU here" in done.stderr
