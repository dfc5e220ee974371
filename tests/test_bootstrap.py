"""scripts/bootstrap.sh: which interpreter it takes, what it says when there is none, and when it installs.

Nothing is installed: interpreters are small scripts in front of the one that runs the tests, seen alone on PATH.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from glob import glob
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "bootstrap.sh"
BASH = shutil.which("bash")
TOOLS = ("awk", "bash", "dirname", "mkdir", "mv", "rm", "cp", "sleep")

GOOD = f'exec "{sys.executable}" "$@"'
SHIM = 'echo "pyenv: $0: command not found" >&2; exit 127'
OLD = f"""exec "{sys.executable}" -c 'import sys; sys.version_info = (3, 11, 7); exec(sys.argv[-1])' "$@" """
BARE = f"""exec "{sys.executable}" -c 'import sys; sys.modules["ensurepip"] = None; exec(sys.argv[-1])' "$@" """
# Makes environments of copies of itself, writes down what it is asked to do, and installs nothing.
MAKER = f"""
case "$*" in
"-m venv --clear "*) echo venv >>"$LOG"; rm -rf "$4"; mkdir -p "$4/bin"; cp "$0" "$4/bin/python" ;;
"-m pip --version") ;;
"-m pip install "*) echo install >>"$LOG"; $PIP ;;
*)
    while [[ $1 != -c ]]; do shift; done
    exec "{sys.executable}" -c "import sys; sys.executable = '$0'
$2" "${{@:3}}"
    ;;
esac
"""

nowhere_else = pytest.mark.skipif(
    bool(glob("/opt/*/bin/python3.1[2-9]") + glob("/usr/local/bin/python3.1[2-9]")),
    reason="this machine has a Python where the script looks by itself",
)


class Machine:
    """A folder with its own PATH, home and copy of the project."""

    def __init__(self, folder):
        self.folder, self.tree = folder, folder / "tree"
        self.path, self.log = folder / "bin", folder / "log"
        for made in (self.path, folder / "tools", folder / "home", self.tree / "scripts"):
            made.mkdir(parents=True)
        for tool in TOOLS:
            (folder / "tools" / tool).symlink_to(shutil.which(tool))
        shutil.copy(SCRIPT, self.tree / "scripts")
        for name in ("setup.py", "pyproject.toml"):
            (self.tree / name).write_text("")

    def add(self, name, body):
        """An interpreter, by name on PATH or anywhere by path."""
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!{BASH}\n{body}\n")
        path.chmod(0o755)
        return str(path)

    def environment(self, **more):
        paths = f"{self.path}:{self.folder / 'tools'}"
        return {"PATH": paths, "HOME": str(self.folder / "home"), "LOG": str(self.log), "PIP": "true", **more}

    def run(self, *arguments, **more):
        return subprocess.run(
            [BASH, self.tree / "scripts" / "bootstrap.sh", *arguments],
            env=self.environment(**more),
            capture_output=True,
            text=True,
            timeout=60,
        )

    def find(self, **more):
        return self.run("--find-python", **more)

    def done(self):
        """What was done since the last call."""
        lines = self.log.read_text().split() if self.log.exists() else []
        self.log.unlink(missing_ok=True)
        return lines


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


def test_takes_a_good_one(machine):
    machine.add("python3", GOOD)
    found = machine.find()
    assert (found.returncode, found.stdout, found.stderr) == (0, f"{sys.executable}\n", "")


def test_passes_over_a_shim_that_fails_and_one_that_is_too_old(machine):
    machine.add("python3.12", SHIM)
    machine.add("python3", OLD)
    machine.add("python", GOOD)
    found = machine.find()
    assert (found.returncode, found.stdout, found.stderr) == (0, f"{sys.executable}\n", "")


def test_finds_what_a_shim_of_pyenv_hides(machine):
    machine.add("pyenv/shims/python3.12", SHIM)
    machine.add("pyenv/versions/3.12.1/bin/python3", GOOD)
    found = machine.find(PATH=f"{machine.path / 'pyenv' / 'shims'}:{machine.folder / 'tools'}")
    assert found.stdout == f"{sys.executable}\n"


@pytest.mark.parametrize("home", [".pyenv/versions/3.13.0/bin", ".local/share/uv/python/cpython-3.12.4-linux/bin"])
def test_finds_one_in_the_home(machine, home):
    machine.add(machine.folder / "home" / home / "python3", GOOD)
    assert machine.find().stdout == f"{sys.executable}\n"


def test_tries_the_given_one_first_and_says_when_it_is_of_no_use(machine):
    given = machine.add(machine.folder / "mine" / "python", GOOD)
    machine.add("python3.12", SHIM)
    assert machine.find(PYTHON=given).stderr == ""
    machine.add("python3.12", GOOD)
    machine.add(given, OLD)
    found = machine.find(PYTHON=given)
    assert found.stdout == f"{sys.executable}\n"
    assert found.stderr == f"bootstrap: PYTHON cannot be used: {given} is Python 3.11\n"


def test_make_passes_the_given_one_on(machine):
    given = machine.add(machine.folder / "mine" / "python", MAKER)
    shutil.copy(SCRIPT.parents[1] / "Makefile", machine.tree)
    for arguments, environment in (([], {"PYTHON": given}), ([f"PYTHON={given}"], {})):
        shutil.rmtree(machine.tree / ".venv", ignore_errors=True)
        command = [shutil.which("make"), "bootstrap", *arguments]
        environment = machine.environment(**environment)
        done = subprocess.run(command, env=environment, cwd=machine.tree, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "PYTHON cannot be used" not in done.stderr
        assert machine.done() == ["venv", "install"]


@nowhere_else
def test_says_what_is_wrong_with_each(machine):
    shim, old, bare = machine.add("python3.12", SHIM), machine.add("python3", OLD), machine.add("python3.13", BARE)
    for run in (machine.find, machine.run):
        found = run()
        assert (found.returncode, found.stdout) == (1, "")
        (line,) = found.stderr.splitlines()
        assert line.startswith("bootstrap: no usable Python >= 3.12 (")
        assert f"{shim} does not run" in line
        assert f"{old} is Python 3.11" in line
        assert f"{bare} has no venv or ensurepip" in line
        for way in ("apt install python3.12-venv", "dnf install python3.12", "pyenv install", "uv python install"):
            assert way in line
    assert not (machine.tree / ".venv").exists()


@nowhere_else
def test_says_that_there_is_none(machine):
    found = machine.find()
    assert (found.returncode, found.stdout) == (1, "")
    assert found.stderr.startswith(
        "bootstrap: no usable Python >= 3.12 (none found at all). Debian/Ubuntu: apt install"
    )
    assert len(found.stderr.splitlines()) == 1


def test_installs_once(machine):
    machine.add("python3", MAKER)
    assert machine.run().returncode == 0
    assert machine.done() == ["venv", "install"]
    again = machine.run()
    assert (again.returncode, again.stdout, again.stderr, machine.done()) == (0, "", "", [])


@pytest.mark.parametrize("name", ["setup.py", "pyproject.toml"])
def test_installs_again_into_the_same_environment_when_the_metadata_changed(machine, name):
    machine.add("python3", MAKER)
    machine.run()
    machine.done()
    (machine.tree / name).write_text("changed")
    assert machine.run().returncode == 0
    assert machine.done() == ["install"]
    assert machine.run().returncode == 0
    assert machine.done() == []


def test_makes_the_environment_anew_when_its_python_is_gone(machine):
    machine.add("python3", MAKER)
    machine.run()
    machine.done()
    (machine.tree / ".venv" / "bin" / "python").unlink()
    machine.run()
    assert machine.done() == ["venv", "install"]


def test_completes_an_environment_made_by_hand(machine):
    machine.add(machine.tree / ".venv" / "bin" / "python", MAKER)
    assert machine.run().returncode == 0
    assert machine.done() == ["install"]


def test_a_failed_install_is_not_taken_for_a_finished_one(machine):
    machine.add("python3", MAKER)
    failed = machine.run(PIP="exit 3")
    assert failed.returncode == 1
    assert "bootstrap: pip failed" in failed.stderr
    machine.done()
    assert machine.run().returncode == 0
    assert machine.done() == ["venv", "install"]


def test_a_killed_install_is_not_taken_for_a_finished_one(machine):
    machine.add("python3", MAKER)
    killed = subprocess.Popen(
        [BASH, machine.tree / "scripts" / "bootstrap.sh"],
        env=machine.environment(PIP="sleep 60"),
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + 30
    while not (machine.log.exists() and "install" in machine.log.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    machine.done()
    assert machine.run().returncode == 0
    assert machine.done() == ["venv", "install"]


def test_a_given_environment_is_checked_and_left_alone(machine):
    given = machine.add(machine.folder / "given" / "python", GOOD.replace('" "$@"', '" -S "$@"'))
    lacking = machine.run(WALLFACER_PYTHON=given)
    assert lacking.returncode == 1
    assert "lacks: torch numpy rich matplotlib yaml megatron.training megatron_wallfacer" in lacking.stderr
    modules = machine.folder / "modules"
    (modules / "megatron" / "training").mkdir(parents=True)
    for name in ("torch", "numpy", "rich", "matplotlib", "yaml", "megatron_wallfacer", "pytest", "hypothesis", "ruff"):
        (modules / f"{name}.py").write_text("raise SystemExit('imported')")
    checked = machine.run(WALLFACER_PYTHON=given, PYTHONPATH=str(modules))
    assert (checked.returncode, checked.stderr) == (0, "")
    assert not (machine.tree / ".venv").exists()


@pytest.mark.parametrize("given", ["python3", "/no/such/python"])
def test_a_given_environment_must_be_a_path(machine, given):
    machine.add("python3", GOOD)
    rejected = machine.run(WALLFACER_PYTHON=given)
    assert rejected.returncode == 1
    assert rejected.stderr == f"bootstrap: WALLFACER_PYTHON={given} must be the path of an interpreter\n"
