"""No test and no tool uses a port that it does not hold: green beside a process that takes what it can get."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.megatron.training import arguments
from tests.support.job_store import job_store
from tests.support.megatron_runs import REPOSITORY, train

FOLDERS = ("megatron_wallfacer", "scripts", "benchmarks", "tests")


@contextmanager
def port_grabber() -> Iterator[None]:
    """Take free ports all the time, in another process."""
    command = [sys.executable, str(Path(__file__).with_name("port_grabber.py"))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=os.environ) as grabber:
        assert grabber.stdout is not None
        assert grabber.stdout.readline() == b"grabbing\n"
        try:
            yield
            assert grabber.poll() is None
        finally:
            grabber.kill()


def test_the_port_of_a_job_is_held_from_the_start() -> None:
    with job_store() as variables, socket.socket() as other, pytest.raises(OSError, match="in use"):
        other.bind((variables["MASTER_ADDR"], int(variables["MASTER_PORT"])))


def test_jobs_are_green_beside_a_process_that_takes_ports() -> None:
    with port_grabber():
        assert len(train(2, [*arguments(iterations=1), "--wallfacer-cp-size", "2"]).check().iterations) == 1


def test_no_port_is_probed_and_bound_later() -> None:
    """A socket whose name is read but which is not handed over: the port is another's when it is used."""
    probe = re.compile(r"getsockname\(\)\[1\]|def _?free_ports?|get_free_port|find_free_port")
    here = Path(__file__)
    files = [path for folder in FOLDERS for path in (REPOSITORY / folder).rglob("*.py") if path != here]
    assert len(files) > 300
    assert [str(path) for path in files if probe.search(path.read_text())] == []
