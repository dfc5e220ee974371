"""Optional libraries, which are imported only when a kernel is created."""

from __future__ import annotations

import importlib
import sys
from dataclasses import dataclass
from importlib import metadata
from types import ModuleType

from megatron_wallfacer.errors import WallfacerError


class UnavailableError(WallfacerError):
    """A library is not installed, fails to import, or has a version that is not supported."""


@dataclass(frozen=True)
class Library:
    """One optional library.

    Attributes:
        package: name on the package index.
        modules: possible names of the library's module. The first that is installed is imported.
        install: command that installs the library.
    """

    package: str
    modules: tuple[str, ...]
    install: str

    @property
    def title(self) -> str:
        """Return name and version of the package, such as ``flash-attn 2.8.3``; the name if it is not installed."""
        try:
            return f"{self.package} {metadata.version(self.package)}"
        except metadata.PackageNotFoundError:
            return self.package

    def load(self) -> ModuleType:
        """Import the first module that is installed, and return it.

        Raises:
            UnavailableError: No module is installed, or the module fails to import.
        """
        for name in self.modules:
            root = name.partition(".")[0]
            if root in sys.modules and sys.modules[root] is None:
                raise UnavailableError(f"{self.title} does not run on the CPU, so CPU ranks do not import it")
            try:
                return importlib.import_module(name)
            except ModuleNotFoundError as error:
                # If a dependency of the library is not installed, the message names the dependency.
                if error.name is None or not f"{name}.".startswith(f"{error.name}."):
                    raise UnavailableError(f"{self.title} does not import: {error}") from error
            except Exception as error:
                # A library for another torch or CUDA raises OSError, RuntimeError or AttributeError.
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
                raise UnavailableError(f"{self.title} does not import: {reason}") from error
        raise UnavailableError(f"{self.package} is not installed: {self.install}")


TRANSFORMER_ENGINE = Library(
    "transformer-engine",
    ("transformer_engine.pytorch.cpp_extensions.fused_attn",),
    "pip install --no-build-isolation transformer-engine[pytorch]",
)
FLASH_ATTN_2 = Library(
    "flash-attn", ("flash_attn.flash_attn_interface",), "pip install --no-build-isolation flash-attn"
)
FLASH_ATTN_3 = Library(
    "flash-attn-3",
    # TransformerEngine's instructions install it as the second module.
    ("flash_attn_interface", "flash_attn_3.flash_attn_interface"),
    "python setup.py install in the folder hopper of the flash-attention repository",
)
#: Library of the GPU kernels for row operations. PyTorch's wheels for GPUs include Triton.
TRITON = Library("triton", ("triton",), "pip install triton")
FLASH_ATTN_4 = Library("flash-attn-4", ("flash_attn.cute.interface",), "pip install flash-attn-4")
