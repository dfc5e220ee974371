"""Which Megatron this is, read without importing it, and whether the hooks are written for it."""

from __future__ import annotations

import ast
import importlib.util
import os
from pathlib import Path

from megatron_wallfacer.errors import WallfacerError
from megatron_wallfacer.megatron.releases import FIRST_LAUNCHED, REQUIREMENT, SUPPORTED, UNTIL, version_text

Version = tuple[int, int, int]

#: Set to 1 to try the hooks on another version; each still checks its own target.
ALLOW_UNTESTED = "WALLFACER_ALLOW_UNTESTED"


def megatron_version() -> Version:
    """(major, minor, patch) of the ``megatron.core`` that would be imported.

    Raises:
        WallfacerError: there is none, or it does not say its version.
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
    """Stop on a Megatron that the hooks are not written for.

    Raises:
        WallfacerError: naming the version, the supported range and the way out.
    """
    if FIRST_LAUNCHED <= version[:2] < UNTIL or untested_allowed():
        return
    raise WallfacerError(
        f"megatron-core {version_text(version)} is not supported: use {SUPPORTED}, a newer megatron-wallfacer, "
        f"or set {ALLOW_UNTESTED}=1 to try"
    )


def untested_allowed() -> bool:
    """Whether the user wants to try a Megatron that nobody has tested."""
    return os.environ.get(ALLOW_UNTESTED) == "1"


def _read_version(package_info: Path) -> Version:
    """MAJOR, MINOR, PATCH as assigned in package_info.py; importing it would run git."""
    numbers: dict[str, int] = {}
    try:
        tree = ast.parse(package_info.read_text())
    except (OSError, SyntaxError) as error:
        raise WallfacerError(f"cannot read Megatron's version from {package_info}: {error}") from error
    for node in tree.body:
        match node:
            case ast.Assign(targets=[ast.Name(id=name)], value=ast.Constant(value=int(number))):
                numbers[name] = number
    try:
        return numbers["MAJOR"], numbers["MINOR"], numbers["PATCH"]
    except KeyError as error:
        raise WallfacerError(f"{package_info} has no {error.args[0]}: cannot tell Megatron's version") from error
