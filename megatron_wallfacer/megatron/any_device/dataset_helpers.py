"""Megatron's compiled data-set helpers, without compiling them.

On rank 0 `_compile_dependencies` (megatron/training/initialize.py) runs `make` in megatron/core/datasets. That fails in
an installed wheel, which brings the compiled module and no Makefile, and in a checkout on a machine without pybind11.
The source, one C++ file, has been the same for many releases, so a wheel's compiled module serves a checkout as well,
if the two sources are equal byte for byte. Where neither helps, Megatron's own `make` runs and speaks for itself.
"""

from __future__ import annotations

import importlib.machinery
import importlib.metadata
import importlib.util
import sys
from pathlib import Path
from typing import Any

from megatron_wallfacer.megatron.replace import replace

MODULE = "megatron.core.datasets.helpers_cpp"


def install() -> None:
    """Load the compiled helpers and have Megatron not compile them; without any, leave the compiling to Megatron."""
    if provide():
        # _compile_dependencies imports the function when it calls it, so this is the binding it finds.
        replace("megatron.core.datasets.utils.compile_helpers", _nothing_to_compile)


def _nothing_to_compile(*_: Any, **__: Any) -> None:
    """The helpers are there."""


def provide() -> bool:
    """Make `megatron.core.datasets.helpers_cpp` importable in this process.

    Returns:
        Whether it is, and no older than its source: False means that it has to be compiled first.
    """
    if MODULE in sys.modules:
        return True
    spec = importlib.util.find_spec(MODULE)
    if spec is not None:
        return _is_current(Path(spec.origin))
    package = importlib.util.find_spec("megatron.core.datasets")
    if package is None or not package.submodule_search_locations:
        return False
    source = Path(package.submodule_search_locations[0]) / "helpers.cpp"
    binary = _compiled_from(source)
    if binary is None:
        return False
    loader = importlib.machinery.ExtensionFileLoader(MODULE, str(binary))
    spec = importlib.util.spec_from_file_location(MODULE, binary, loader=loader)
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    sys.modules[MODULE] = module
    return True


def _is_current(binary: Path) -> bool:
    """Whether a compiled module serves as it is: a checkout's source may have changed since, and `make` sees that."""
    source = binary.with_name("helpers.cpp")
    if not binary.with_name("Makefile").is_file() or not source.is_file():
        return True
    return binary.stat().st_mtime >= source.stat().st_mtime


def _compiled_from(source: Path) -> Path | None:
    """The compiled module of an installed megatron-core whose helpers.cpp equals `source`, for this Python."""
    for distribution in importlib.metadata.distributions(name="megatron-core"):
        folder = Path(str(distribution.locate_file("megatron/core/datasets")))
        twin = folder / "helpers.cpp"
        if not twin.is_file() or not source.is_file() or twin.read_bytes() != source.read_bytes():
            continue
        for suffix in importlib.machinery.EXTENSION_SUFFIXES:
            binary = folder / f"helpers_cpp{suffix}"
            if binary.is_file():
                return binary
    return None
