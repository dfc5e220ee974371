"""Which cuDNN libraries a process has, and whether they are one: parts of two do not work together."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import PurePosixPath

from megatron_wallfacer.doctor.finding import Finding

#: ``libcudnn.so.9`` and the libraries that it loads, such as ``libcudnn_graph.so.9``.
_LIBRARY = r"libcudnn(?:_[a-z0-9_]+)?\.so[.\d]*"
_IN_MAPS = re.compile(rf"^\S+ \S+ \S+ \S+ \S+ +(/.*)/{_LIBRARY}(?: \(deleted\))?$", re.MULTILINE)
_IN_CACHE = re.compile(r"^\s*libcudnn\.so[.\d]* \(.*\) => (/.*)/[^/]+$", re.MULTILINE)
#: What TransformerEngine and cuDNN raise where parts of two libraries meet.
_MIXED = ("CUDNN_STATUS_SUBLIBRARY_LOADING_FAILED", "CUDNN_STATUS_SUBLIBRARY_VERSION_MISMATCH")


def folders_in_maps(maps: str) -> tuple[str, ...]:
    """Return the folders of cuDNN libraries that a process has loaded, each once, from its ``/proc/PID/maps``."""
    return tuple(dict.fromkeys(_IN_MAPS.findall(maps)))


def folder_of_loader(library_path: Sequence[str], cache: str) -> str | None:
    """Return the folder where the loader finds ``libcudnn.so`` by its name; None where it finds none.

    Args:
        library_path: folders of ``LD_LIBRARY_PATH`` that have it.
        cache: output of ``ldconfig -p``.
    """
    return next(iter((*library_path, *_IN_CACHE.findall(cache))), None)


def cure(folder: str) -> str:
    """Return what to export so that every library takes the cuDNN of this folder."""
    place = PurePosixPath(folder)
    home = place.parent if place.name in ("lib", "lib64") else place
    return f"export CUDNN_HOME={home} LD_LIBRARY_PATH={folder}:$LD_LIBRARY_PATH"


def is_mixed(error: str) -> bool:
    """Return whether an error of a kernel is that of two cuDNN libraries."""
    return any(status in error for status in _MIXED)


def cudnn_finding(loaded: Sequence[str], own: str, loader: str | None, *, failed: bool) -> Finding:
    """Return what there is to say of the cuDNN libraries of a process.

    Args:
        loaded: folders of those that it has, torch's and the kernels'; at least one.
        own: folder of the one that comes with torch.
        loader: see :func:`folder_of_loader`.
        failed: a kernel did not answer, or answered wrong.
    """
    if len(loaded) > 1:
        text = f"two cuDNN libraries in one process: {', '.join(loaded)}"
        return Finding("cudnn", "problem" if failed else "note", text, cure(own))
    if loader not in (None, *loaded):
        text = f"{loaded[0]}; a library that looks for cuDNN by its name finds {loader}"
        return Finding("cudnn", "note", text, f"nothing while each kernel answers; else {cure(own)}")
    return Finding("cudnn", "ok", loaded[0])
