"""A headless Chromium for tests, without a network."""

from __future__ import annotations

import functools
import os
import shutil
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
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    try:
        yield driver
    finally:
        driver.quit()
