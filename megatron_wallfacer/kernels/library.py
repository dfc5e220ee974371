"""A kernel that is functions of a library that may be installed or not."""

from __future__ import annotations

from types import ModuleType
from typing import ClassVar

from megatron_wallfacer.kernels.fused import FusedKernel
from megatron_wallfacer.kernels.optional import Library
from megatron_wallfacer.kernels.signatures import Callee


class LibraryKernel(FusedKernel):
    """Finds the functions of forward and backward, which a subclass names.

    Args:
        module: where they are; None for the library that is installed.
        title: name and version of the library, for messages.
        deterministic: see :class:`FusedKernel`.

    Raises:
        UnavailableError: the library is not installed, or of a version that does not fit.
    """

    library: ClassVar[Library]
    functions: ClassVar[tuple[str, str]]
    #: The releases that fit, for messages.
    needs: ClassVar[str]

    def __init__(
        self, module: ModuleType | None = None, *, title: str | None = None, deterministic: bool | None = None
    ) -> None:
        super().__init__(deterministic=deterministic)
        self._module, self._title = module or self.library.load(), title or self.library.title
        self._attend, self._differentiate = self._find(self.functions)

    def _find(self, functions: tuple[str, str]) -> tuple[Callee, Callee]:
        forward, backward = (
            Callee(getattr(self._module, name, None), name=name, owner=self._title, needs=self.needs)
            for name in functions
        )
        return forward, backward
