"""``wallfacer doctor``: what it finds here, on a Megatron that does not fit, and on machines that are not this one."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megatron_wallfacer.cli.main import main
from megatron_wallfacer.doctor import interfaces as network
from megatron_wallfacer.doctor import plugin, variables
from megatron_wallfacer.doctor import process as command
from megatron_wallfacer.doctor import pytorch as machine
from megatron_wallfacer.doctor.checks import CHECKS
from megatron_wallfacer.doctor.finding import Finding, examined
from megatron_wallfacer.doctor.interfaces import Interface, nccl_choice
from megatron_wallfacer.doctor.process import examine
from megatron_wallfacer.kernels import KERNELS
from megatron_wallfacer.megatron.hook import Hook
from megatron_wallfacer.megatron.hooks import Hooks
from megatron_wallfacer.megatron.session import Session

REPOSITORY = Path(__file__).parents[2]
HOOKS = Hooks(Session((0, 19, 2), torch.device("cpu"))).every
LO = Interface("lo", ("127.0.0.1", "::1"), up=True)
ETH0, IB0 = Interface("eth0", ("192.0.2.2",), up=True), Interface("ib0", ("192.0.2.3",), up=True)
DOWN = Interface("eth1", ("192.0.2.4",), up=False)


def clean() -> dict[str, str]:
    """An environment without what the doctor reads."""
    read = ("NCCL_", "GLOO_", "TORCH_", "CUDA_", "OMP_", "MASTER_", "WALLFACER_", "NVTE_", "PYTHONPATH")
    return {name: value for name, value in os.environ.items() if not name.startswith(read)}


def doctor(*words: str) -> subprocess.CompletedProcess[str]:
    call = "import sys; from megatron_wallfacer.cli.main import main; sys.exit(main())"
    return subprocess.run(
        [sys.executable, "-c", call, "doctor", *words],
        cwd=REPOSITORY,
        env=clean() | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.fixture(scope="module")
def here() -> subprocess.CompletedProcess[str]:
    """The CPU of this machine and the installed Megatron, in a pipe."""
    return doctor()


def lines(text: str) -> dict[str, str]:
    """By name, the line."""
    return {re.split(r" {2,}", line)[1]: line for line in text.splitlines()[1:-1]}


def test_no_problem_here(here: subprocess.CompletedProcess[str]) -> None:
    assert here.returncode == 0, here.stdout + here.stderr
    found = lines(here.stdout)
    assert found["megatron"].startswith("ok ")
    assert found["cuda"].startswith("note ")
    assert "ranks are CPU processes over gloo" in found["cuda"]
    hooks = [name for name in found if name.startswith("hook ")]
    assert hooks == [f"hook {hook.name}" for hook in HOOKS]
    assert "add_megatron_arguments with parser" in found["hook arguments"]
    assert {name.removeprefix("kernel ") for name in found if name.startswith("kernel ")} == set(KERNELS) - {"flash"}
    assert "torch, for bf16, head dim 128" in found["kernel auto"]
    for name in ("torch", "reference"):
        assert found[f"kernel {name}"].startswith("ok ")
        assert "called forward and backward: relative errors out " in found[f"kernel {name}"]
    assert "team-ring: kv_team 2 x ring_outer 4" in found["scheme auto, cp size 8"]
    assert re.fullmatch(r"no problems, \d+ notes", here.stdout.splitlines()[-1])


def test_in_a_pipe_it_is_plain(here: subprocess.CompletedProcess[str]) -> None:
    assert here.stdout.isascii()
    assert "\x1b" not in here.stdout
    assert all(line == line.rstrip() for line in here.stdout.splitlines())
    assert all(re.match(r"(ok|note|problem) ", line) for line in here.stdout.splitlines()[1:-1])


@pytest.fixture(scope="module")
def unfit(tmp_path_factory: pytest.TempPathFactory) -> subprocess.CompletedProcess[str]:
    """A checkout with one hook's target gone and another's signature changed; the rest of Megatron is the installed."""
    folder = tmp_path_factory.mktemp("checkout")
    training = folder / "megatron" / "training"
    training.mkdir(parents=True)
    (training / "__init__.py").touch()
    (training / "arguments.py").write_text("def add_megatron_arguments(renamed):\n    return renamed\n")
    (training / "training.py").write_text("print('chatter on stdout')\n")
    return doctor("--megatron-path", str(folder), "--json")


def test_hooks_that_do_not_fit_are_problems(unfit: subprocess.CompletedProcess[str]) -> None:
    assert unfit.returncode == 1
    findings = [Finding(**entry) for entry in json.loads(unfit.stdout)]
    problems = {finding.name: finding for finding in findings if finding.status == "problem"}
    in_training = {f"hook {hook.name}" for hook in HOOKS if hook.target.startswith("megatron.training.")}
    assert set(problems) == in_training >= {"hook arguments", "hook layer count"}
    assert "add_megatron_arguments has no parameter parser" in problems["hook arguments"].found
    assert "setup_model_and_optimizer does not exist" in problems["hook layer count"].found
    assert all("docs/versions.md" in problem.remedy for problem in problems.values())
    assert len(findings) > len(CHECKS)  # it went on


def test_a_path_that_is_no_checkout_is_wrong_usage(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["doctor", "--megatron-path", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert (
        said == f"wallfacer: error: --megatron-path {tmp_path}: must be a Megatron-LM checkout, with megatron/ in it\n"
    )


def test_a_missing_megatron_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda *_: None)
    (found,) = examined("megatron", plugin.megatron, "install it")
    assert (found.name, found.status, found.remedy) == ("megatron", "problem", "install it")
    assert found.found.startswith("megatron.core is neither beside the script nor installed")


def test_a_megatron_that_is_not_supported_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_wallfacer.megatron.version.megatron_version", lambda: (0, 16, 1))
    found = {finding.name: finding for finding in plugin.megatron()}
    assert found["megatron"].status == "problem"
    assert "megatron-core 0.16.1 is not supported" in found["megatron"].found
    # Written for 0.19 and later, and needed for packed sequences only.
    assert found["hook rope of packed sequences"].status == "note"


def test_a_hook_is_looked_at_and_not_installed() -> None:
    hook = Hook("a hook", "argparse:ArgumentParser.parse_args", (0, 17), (0, 21), ("self", "args"), lambda _: None)
    import argparse

    before = argparse.ArgumentParser.parse_args
    assert [finding.status for finding in plugin._hook(hook, (0, 19, 0))] == ["ok"]
    assert argparse.ArgumentParser.parse_args is before


def test_a_check_that_raises_is_one_line() -> None:
    def broken() -> Iterator[Finding]:
        yield Finding("first", "ok", "fine")
        raise RuntimeError("undefined symbol:\n  _ZN3c10")

    assert list(examined("second", broken, "install it again")) == [
        Finding("first", "ok", "fine"),
        Finding("second", "problem", "RuntimeError: undefined symbol: _ZN3c10", "install it again"),
    ]

    def leaves() -> Iterator[Finding]:
        sys.exit()
        yield

    assert [finding.found for finding in examined("x", leaves, "")] == ["SystemExit"]


def test_a_process_that_dies_is_a_problem_after_what_it_found(monkeypatch: pytest.MonkeyPatch) -> None:
    first = '{"name": "python", "status": "ok", "found": "3.12", "remedy": ""}\n'
    outcomes = {
        "ended with SIGSEGV: Segmentation fault": (-11, "loading\nSegmentation fault\n"),
        "ended with exit code 3: it said nothing": (3, ""),
    }
    for text, (code, stderr) in outcomes.items():
        done = subprocess.CompletedProcess([], code, first + '{"name": "tor', stderr)
        monkeypatch.setattr(command.subprocess, "run", lambda *_, done=done, **__: done)
        python, died = examine({})
        assert python.name == "python"
        assert (died.status, died.found) == ("problem", f"the process that looks {text}; after 'python'")

    def sleeps(*_: object, **__: object) -> None:
        raise subprocess.TimeoutExpired("doctor", 1, first.encode())

    monkeypatch.setattr(command.subprocess, "run", sleeps)
    assert [finding.status for finding in examine({})] == ["ok", "problem"]


def test_at_a_terminal_nothing_is_cut_off(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "60")
    name = "a.module.with.a.long.name:" + "x" * 80
    command._show([Finding("hook", "problem", name, "[do] this")])
    shown = re.sub(r"\x1b\[[\d;]*m", "", capsys.readouterr().out)
    assert name in re.sub(r"\s", "", shown)
    assert "-> [do] this" in shown
    assert "1 problem, no notes" in shown


class TestMachine:
    def test_what_is_too_old(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(machine.sys, "version_info", (3, 11, 9))
        assert [(f.status, f.remedy) for f in machine.python()] == [("problem", "use Python 3.12 or newer")]
        monkeypatch.setattr(torch, "__version__", "2.5.1+cu124")
        assert [(f.status, f.remedy) for f in machine.torch_version()] == [("problem", "install torch 2.6 or newer")]
        monkeypatch.setattr(torch, "__version__", "2.10.0a0+git")
        assert [f.status for f in machine.torch_version()] == ["ok"]

    def test_bounds_are_those_of_setup(self) -> None:
        setup = (REPOSITORY / "setup.py").read_text()
        assert f'"torch>={machine._text(machine.TORCH)},' in setup
        assert f'python_requires=">={machine._text(machine.PYTHON)}"' in setup

    def test_a_gpu_that_torch_does_not_see(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
        (found,) = machine.cuda()
        assert found.status == "problem"
        assert found.found.startswith("CUDA_VISIBLE_DEVICES=0, but torch")
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        assert [f.status for f in machine.cuda()] == ["note"]

    def test_gpus_without_nccl(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: False)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        assert next(iter(machine.communication())).status == "problem"
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert next(iter(machine.communication())).status == "note"


class TestNetwork:
    @pytest.fixture(autouse=True)
    def machine(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "MASTER_ADDR"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr(network, "interfaces", lambda: [LO, ETH0, DOWN])
        monkeypatch.setattr(socket, "gethostname", lambda: "box")
        self.resolves(monkeypatch, "192.0.2.2")

    def resolves(self, monkeypatch: pytest.MonkeyPatch, *addresses: str) -> None:
        monkeypatch.setattr(network, "resolved", lambda _: list(addresses))

    def test_this_machine_has_a_loopback(self) -> None:
        import psutil

        assert "lo" in psutil.net_if_addrs()

    def test_of_the_host_name(self, monkeypatch: pytest.MonkeyPatch) -> None:
        (found,) = network.gloo_interface()
        assert (found.status, found.found) == ("ok", "eth0 (192.0.2.2), by the host name box")
        for addresses, text in (
            ((), "loopback: the host name box does not resolve"),
            (("127.0.1.1",), "loopback: the host name box is 127.0.1.1"),
            (("198.51.100.7",), "the host name box is 198.51.100.7, which no interface here has"),
        ):
            self.resolves(monkeypatch, *addresses)
            (found,) = network.gloo_interface()
            assert (found.status, found.found) == ("note", text)
            assert "export GLOO_SOCKET_IFNAME=eth0" in found.remedy

    def test_of_the_variable(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for value, status in (("eth0", "ok"), ("lo,eth0", "ok"), ("eth1", "problem"), ("eth0,eth9", "problem")):
            monkeypatch.setenv("GLOO_SOCKET_IFNAME", value)
            assert [f.status for f in network.gloo_interface()] == [status], value

    def test_loopback_only(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert [f.status for f in network.network()] == ["ok"]
        monkeypatch.setattr(network, "interfaces", lambda: [LO, DOWN])
        (found,) = network.network()
        assert found.status == "note"
        assert found.found == "lo (127.0.0.1, ::1); eth1 (192.0.2.4, down)"

    def test_nccl_chooses(self) -> None:
        docker, bridge = Interface("docker0", ("172.17.0.1",), up=True), Interface("virbr0", ("192.0.2.9",), up=True)
        for there, wanted, chosen in (
            ([LO, ETH0, IB0, docker], "", [IB0]),
            ([LO, ETH0, DOWN, docker, bridge], "", [ETH0]),
            ([LO, docker], "", [docker]),
            ([LO, bridge], "", [LO]),
            ([LO, ETH0, IB0], "eth", [ETH0]),
            ([LO, ETH0, IB0], "^lo,ib", [ETH0]),
            ([LO, ETH0, IB0], "=eth", []),
            ([LO, ETH0, IB0], "=eth0", [ETH0]),
            ([LO, ETH0, IB0], "^=eth0,lo", [IB0]),
            ([LO, DOWN], "eth", []),
        ):
            assert nccl_choice(there, wanted) == chosen, (there, wanted)

    def test_nccl_matters_where_there_are_gpus(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("NCCL_SOCKET_IFNAME", "eth9")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert list(network.nccl_interface()) == []
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        (found,) = network.nccl_interface()
        assert (found.status, found.found) == ("problem", "none matches NCCL_SOCKET_IFNAME=eth9")
        monkeypatch.setenv("NCCL_SOCKET_IFNAME", "lo")
        assert [f.status for f in network.nccl_interface()] == ["note"]

    def test_the_master(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert list(network.meeting_point()) == []
        monkeypatch.setenv("MASTER_ADDR", "first")
        assert [f.status for f in network.meeting_point()] == ["ok"]
        self.resolves(monkeypatch)
        assert [f.status for f in network.meeting_point()] == ["problem"]


def test_names_are_resolved() -> None:
    assert "127.0.0.1" in network.resolved("127.0.0.1")
    assert network.resolved("no.such.host.invalid") == []


class TestVariables:
    @pytest.mark.parametrize(
        ("capability", "value", "status"),
        [
            (None, None, "ok"),
            (None, "1", "ok"),
            (None, "8", "problem"),
            (9, None, "problem"),
            (9, "1", "ok"),
            (9, "8", "problem"),
            (10, None, "ok"),
            (10, "8", "ok"),
        ],
    )
    def test_connections(
        self, capability: int | None, value: str | None, status: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (capability, 0))
        monkeypatch.delenv(variables.CONNECTIONS, raising=False)
        if value is not None:
            monkeypatch.setenv(variables.CONNECTIONS, value)
        assert [f.status for f in variables.connections()] == [status]

    def test_threads(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        for value, status in (("1", "ok"), ("4", "note")):
            monkeypatch.setenv(variables.THREADS, value)
            assert [f.status for f in variables.threads()] == [status]

    def test_restarts_name_the_variable(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for value, said in (
            ("1", "=1; torchrun --max-restarts works"),
            ("0", "only torchrun --max-restarts over gloo"),
        ):
            monkeypatch.setenv(variables.OWN_STORE, value)
            (finding,) = variables.restarts()
            assert said in finding.found

    def test_others_are_shown_and_the_slow_are_noted(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(os, "environ", {"HOME": "/", "NCCL_DEBUG": "WARN", "NCCL_P2P_DISABLE": "1"})
        assert [(f.status, f.found) for f in variables.others()] == [
            ("ok", "NCCL_DEBUG=WARN"),
            ("note", "NCCL_P2P_DISABLE=1"),
        ]
        monkeypatch.setattr(os, "environ", {"WALLFACER_ALLOW_UNTESTED": "1"})
        assert [f.status for f in variables.others()] == ["note"]
