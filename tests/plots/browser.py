"""A headless Chromium for tests, without a network."""

from __future__ import annotations

import functools
import os
import random
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tests.support.machine import install

PACKAGES = ("chromium", "chromium-driver", "fonts-dejavu-core")


@functools.cache
def why_not() -> str | None:
    """Install what is missing; the reason why there can be no browser here, if there is one."""
    if all(map(shutil.which, ("chromium", "chromedriver"))):
        return None
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        return "needs chromium and chromedriver, or root and apt-get to install them"
    return install(PACKAGES)


@contextmanager
def browser() -> Iterator[Any]:
    """A driver; every host name leads nowhere."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for flag in ("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"):
        options.add_argument(flag)
    options.add_argument("--host-resolver-rules=MAP * ~NOTFOUND")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    path = shutil.which("chromedriver")
    process, port = started(path)
    service = webdriver.ChromeService(path, port=port)
    service.process, service.start = process, lambda: None
    driver = webdriver.Chrome(options, service)
    try:
        yield driver
    finally:
        driver.quit()


def started(chromedriver: str) -> tuple[subprocess.Popen, int]:
    """A running chromedriver and the port that it holds.

    It takes no port from the kernel, only one that is named. The kernel gives away none of these, and where another
    process has it, chromedriver ends and is started with another one. selenium alone would probe a port, and try once.
    """
    for _ in range(100):
        port = random.randrange(10_000, 32_768)
        process = subprocess.Popen(
            [chromedriver, f"--port={port}"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        if any("started successfully" in line for line in process.stdout):
            return process, port
        process.wait()
    raise AssertionError("chromedriver found no port in 100 attempts")
