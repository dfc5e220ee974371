"""Find the cuDNN libraries of a process, because libraries of two cuDNN releases do not work together."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import PurePosixPath

from megatron_wallfacer.doctor.finding import Finding

#: ``libcudnn.so.9`` and the libraries that it loads, such as ``libcudnn_graph.so.9``.
_LIBRARY = r"libcudnn(?:_[a-z0-9_]+)?\.so[.\d]*"
_IN_MAPS = re.compile(rf"^\S+ \S+ \S+ \S+ \S+ +(/.*)/{_LIBRARY}(?: \(deleted\))?$", re.MULTILINE)
_IN_CACHE = re.compile(r"^\s*libcudnn\.so[.\d]* \(.*\) => (/.*)/[^/]+$", re.MULTILINE)
#: Errors of TransformerEngine and cuDNN if a process has loaded libraries of two cuDNN releases.
_MIXED = ("CUDNN_STATUS_SUBLIBRARY_LOADING_FAILED", "CUDNN_STATUS_SUBLIBRARY_VERSION_MISMATCH")


def folders_in_maps(maps: str) -> tuple[str, ...]:
    """Return the folders of the cuDNN libraries in ``/proc/PID/maps`` of a process, without duplicates."""
    return tuple(dict.fromkeys(_IN_MAPS.findall(maps)))


def folder_of_loader(library_path: Sequence[str], cache: str) -> str | None:
    """Return the folder where the dynamic loader finds ``libcudnn.so``, or None.

    ``library_path`` has the folders of ``LD_LIBRARY_PATH`` that contain cuDNN. ``cache`` is the output of
    ``ldconfig -p``.
    """
    return next(iter((*library_path, *_IN_CACHE.findall(cache))), None)


def export_command(folder: str) -> str:
    """Return the shell command that makes every library use the cuDNN of a folder."""
    place = PurePosixPath(folder)
    home = place.parent if place.name in ("lib", "lib64") else place
    return f"export CUDNN_HOME={home} LD_LIBRARY_PATH={folder}:$LD_LIBRARY_PATH"


def is_mixed(error: str) -> bool:
    """Return whether an error text reports libraries of two cuDNN releases in one process."""
    return any(status in error for status in _MIXED)


def cudnn_finding(loaded: Sequence[str], of_torch: str, loader: str | None, *, failed: bool) -> Finding:
    """Return the finding on the cuDNN libraries of a process.

    Args:
        loaded: folders of the loaded libraries, at least one.
        of_torch: folder of the cuDNN that PyTorch installs.
        loader: result of :func:`folder_of_loader`.
        failed: whether a kernel failed or was inaccurate.
    """
    if len(loaded) > 1:
        text = f"two cuDNN libraries in one process: {', '.join(loaded)}"
        return Finding("cudnn", "problem" if failed else "note", text, export_command(of_torch))
    if loader not in (None, *loaded):
        text = f"{loaded[0]}; a library that loads cuDNN by name gets {loader}"
        return Finding("cudnn", "note", text, f"nothing while all kernels work; else {export_command(of_torch)}")
    return Finding("cudnn", "ok", loaded[0])
