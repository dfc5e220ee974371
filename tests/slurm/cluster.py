"""A Slurm cluster of four nodes on this machine: munged, slurmctld and four slurmd with their state in one folder.

The nodes are named 127.0.0.1 to 127.0.0.4, so that their names lead to this machine without a line in /etc/hosts.
The daemons read the numbers of their ports from a file. So the cluster has a network namespace of its own, in which no
other process can take them.
"""

from __future__ import annotations

import functools
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from tests.support.machine import install
from tests.support.namespace import in_namespace, why_no_namespace

NODES = [f"127.0.0.{number}" for number in range(1, 5)]
DAEMONS = ("munged", "slurmctld", "slurmd")
PACKAGES = ("slurm-wlm", "munge", "procps", "iproute2")
#: Ports of slurmctld and of the four slurmd, in the cluster's namespace.
CONTROLLER_PORT, NODE_PORTS = 6817, (6818, 6821)

#: Intervals are as short as Slurm allows: by default a requeued job waits two minutes (cred_expire) and the scheduler
#: looks every one. A node that says nothing for five minutes is not given up: two cores are slow under load.
CONFIGURATION = """
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=10
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/builtin
SchedulerParameters=batch_sched_delay=0,sched_interval=1,builtin_interval=1
ReturnToService=2
SlurmdTimeout=300
BatchStartTimeout=60
MessageTimeout=60
KillWait=5
NodeName=127.0.0.[1-4] NodeHostname={host} Port=[{first}-{last}] CPUs=2
PartitionName=all Nodes=ALL Default=YES MaxTime=60 State=UP
"""


@functools.cache
def why_not() -> str | None:
    """Install what is missing; the reason why there can be no cluster here, if there is one."""
    if os.geteuid() != 0:
        return "needs root: slurmd starts jobs as other users"
    if not all(map(shutil.which, DAEMONS)) and (reason := _install()):
        return reason
    return why_no_namespace()


def _install() -> str | None:
    if not shutil.which("apt-get"):
        return f"needs {', '.join(DAEMONS)}, and there is no apt-get to install them"
    return install(PACKAGES)


def wait_for(what: str, found: Callable[[], object], seconds: float = 120) -> object:
    """What ``found`` returns as soon as it is true.

    Raises:
        AssertionError: it did not become so in time.
    """
    deadline = time.monotonic() + seconds
    while not (answer := found()):
        assert time.monotonic() < deadline, f"{what}: not within {seconds:g} s"
        time.sleep(0.2)
    return answer


def processes_with(variable: str) -> list[int]:
    """Processes that have ``NAME=VALUE`` in their environment."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if variable.encode() in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
    return found


class Cluster:
    """Daemons, and the commands of Slurm against them.

    Args:
        folder: for everything they write; must not be there yet.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(mode=0o755)
        (folder / "state").mkdir()
        self.folder = folder
        # PATH and no more: what this process was started with is no business of the jobs.
        self.environment = {"PATH": os.environ["PATH"], "SLURM_CONF": str(folder / "slurm.conf"), "HOME": str(folder)}
        self._daemons: list[subprocess.Popen] = []
        self._namespace = _namespace()
        self.inside = ("nsenter", f"--net=/proc/{self._namespace.pid}/ns/net")
        try:
            self._start()
        except BaseException:
            self.close()
            raise

    def _start(self) -> None:
        first, last = NODE_PORTS
        ports = {"controller": CONTROLLER_PORT, "first": first, "last": last}
        configuration = CONFIGURATION.format(host=socket.gethostname(), folder=self.folder, **ports)
        (self.folder / "slurm.conf").write_text(configuration)
        (self.folder / "munge.key").write_bytes(os.urandom(1024))
        (self.folder / "munge.key").chmod(0o400)
        paths = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        files = [f"--{option}={self.folder}/munge.{name}" for option, name in paths.items()]
        self._daemon("munged", "--foreground", "--force", *files)
        wait_for("munged's socket", (self.folder / "munge.socket").exists)
        self._daemon("slurmctld", "-D")
        for node in NODES:
            self._daemon("slurmd", "-D", "-N", node)
        wait_for("four idle nodes", lambda: self.slurm("sinfo", "-h", "-t", "idle", "-o", "%D", fails=True) == "4")

    def _daemon(self, *command: str) -> None:
        with (self.folder / f"{command[0]}.out").open("a") as output:
            self._daemons.append(
                subprocess.Popen(
                    (*self.inside, *command), env=self.environment, cwd=self.folder, stdout=output, stderr=output
                )
            )

    def slurm(self, *command: str, fails: bool = False, **variables: str) -> str:
        """What a command of Slurm prints.

        Raises:
            AssertionError: it fails, unless it may.
        """
        done = subprocess.run(
            (*self.inside, *command),
            env=self.environment | variables,
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert fails or done.returncode == 0, f"{' '.join(command)}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def state(self, job: str) -> str:
        """Of a job: PENDING, RUNNING, COMPLETED..."""
        return self.field(job, "JobState")

    def field(self, job: str, name: str) -> str:
        """One of the fields that scontrol shows of a job."""
        words = self.slurm("scontrol", "show", "job", "-o", job).split()
        return next(word.partition("=")[2] for word in words if word.startswith(f"{name}="))

    def close(self) -> None:
        """Cancel what runs, and end the daemons, munged last: the others need it to the end."""
        if len(self._daemons) > 1:
            self.slurm("scancel", "--user=root", fails=True)
            with suppress(AssertionError):
                wait_for("no jobs", lambda: not self.slurm("squeue", "-h", fails=True), 60)
        for daemon in reversed(self._daemons):
            daemon.send_signal(signal.SIGTERM)
            try:
                daemon.wait(30)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        self._daemons.clear()
        self._namespace.communicate()

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _namespace() -> subprocess.Popen:
    """A process in a network namespace, which lasts for as long as a process is in it."""
    command = in_namespace("sh", "-c", "echo up; cat")
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"up\n"
    return process


def lines(path: Path) -> Iterator[str]:
    """Of a file that may not be there yet."""
    return iter(path.read_text(errors="replace").splitlines() if path.exists() else [])
