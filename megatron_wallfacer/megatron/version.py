"""Read the version of Megatron without importing Megatron, and check that the hooks support the version."""

from __future__ import annotations

import importlib.util
import os
import re
from pathlib import Path

from megatron_wallfacer.errors import WallfacerError
from megatron_wallfacer.megatron.releases import FIRST_LAUNCHED, REQUIREMENT, SUPPORTED, UNTIL, version_text

Version = tuple[int, int, int]

#: Environment variable that allows other Megatron versions if set to 1. Each hook still checks its own target.
ALLOW_UNTESTED = "WALLFACER_ALLOW_UNTESTED"


def megatron_version() -> Version:
    """Return (major, minor, patch) of the ``megatron.core`` that Python would import.

    Raises:
        WallfacerError: There is no ``megatron.core``, or its version cannot be read.
    """
    try:
        spec = importlib.util.find_spec("megatron.core")
    except ModuleNotFoundError:
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise WallfacerError(
            "megatron.core is neither beside the script nor installed; "
            f"give the pretrain_gpt.py of a Megatron-LM checkout, or pip install '{REQUIREMENT}'"
        )
    return _read_version(Path(next(iter(spec.submodule_search_locations))) / "package_info.py")


def check_supported(version: Version) -> None:
    """Raise a WallfacerError if a version of Megatron is not supported, unless the user allows untested versions."""
    if FIRST_LAUNCHED <= version[:2] < UNTIL or untested_allowed():
        return
    raise WallfacerError(
        f"megatron-core {version_text(version)} is not supported: use {SUPPORTED}, a newer megatron-wallfacer, "
        f"or set {ALLOW_UNTESTED}=1 to try"
    )


def untested_allowed() -> bool:
    """Return whether the user allows a Megatron version that is not tested."""
    return os.environ.get(ALLOW_UNTESTED) == "1"


def _read_version(package_info: Path) -> Version:
    """Return MAJOR, MINOR and PATCH from package_info.py, which is not imported because its import runs git."""
    try:
        text = package_info.read_text()
    except OSError as error:
        raise WallfacerError(f"cannot read Megatron's version from {package_info}: {error}") from error
    numbers = {name: int(number) for name, number in re.findall(r"^(\w+) *= *(\d+)\b", text, re.MULTILINE)}
    try:
        return numbers["MAJOR"], numbers["MINOR"], numbers["PATCH"]
    except KeyError as error:
        raise WallfacerError(f"{package_info} has no {error.args[0]}: cannot read Megatron's version") from error
