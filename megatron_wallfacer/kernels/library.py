"""A kernel that calls the functions of a library, which may be installed or not."""

from __future__ import annotations

from collections.abc import Iterable
from types import ModuleType

from megatron_wallfacer.kernels.optional import Library
from megatron_wallfacer.kernels.prepared import PreparedKernel
from megatron_wallfacer.kernels.signatures import LibraryFunction


class LibraryKernel(PreparedKernel):
    """Loads the library; a subclass looks its functions up once, when it is constructed.

    Args:
        library: where the functions are looked up without ``module``.
        needs: the releases that fit, for messages.
        module: module with the functions; None for the installed library.
        title: name and version of the library, for messages.
        deterministic: see :class:`PreparedKernel`.

    Raises:
        UnavailableError: the library is not installed, or of a version that does not fit.
    """

    def __init__(
        self, library: Library, needs: str, module: ModuleType | None, title: str | None, deterministic: bool | None
    ) -> None:
        super().__init__(deterministic=deterministic)
        self._needs = needs
        self._module, self._title = module or library.load(), title or library.title

    def _function(self, name: str, tensors: Iterable[str]) -> LibraryFunction:
        function = getattr(self._module, name, None)
        return LibraryFunction(function, name=name, tensors=tensors, owner=self._title, needs=self._needs)
