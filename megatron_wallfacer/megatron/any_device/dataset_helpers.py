"""Load Megatron's compiled data-set helpers without compiling them.

On rank 0 `_compile_dependencies` (megatron/training/initialize.py) runs `make` in megatron/core/datasets. `make` fails
in an installed wheel, which has the compiled module but no Makefile, and in a checkout on a node without pybind11. The
C++ source is one file, which is the same in many releases. If the source of an installed wheel equals the source of the
checkout byte for byte, this module loads the compiled module of the wheel. Otherwise Megatron runs `make`.
"""

from __future__ import annotations

import importlib.machinery
import importlib.metadata
import importlib.util
import sys
from pathlib import Path

from megatron_wallfacer.megatron.replace import replace

MODULE = "megatron.core.datasets.helpers_cpp"


def install() -> None:
    """Make the compiled dataset helpers importable. If they are up to date, Megatron does not compile them."""
    if provide():
        # _compile_dependencies imports the function at each call, so replacing the function in its module is enough.
        replace("megatron.core.datasets.utils:compile_helpers", lambda: None)


def provide() -> bool:
    """Make `megatron.core.datasets.helpers_cpp` importable in this process.

    Returns:
        Whether the module is importable and not older than its source. If False, Megatron must compile the module.
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
    """Return whether a binary is up to date. In a checkout its source may be newer."""
    source = binary.with_name("helpers.cpp")
    if not binary.with_name("Makefile").is_file() or not source.is_file():
        return True
    return binary.stat().st_mtime >= source.stat().st_mtime


def _compiled_from(source: Path) -> Path | None:
    """Return the compiled module of an installed megatron-core whose helpers.cpp equals `source`, or None."""
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
