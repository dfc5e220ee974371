"""Files of published releases as text. Nothing is installed, built or imported.

Wheels are fetched by pip. Of a source distribution pip would run ``setup.py``, so its archive is fetched from the index
that pip is set to, and only the wanted file is read from it. Files are kept in ``~/.cache/megatron-wallfacer``.
"""

from __future__ import annotations

import ast
import hashlib
import html
import io
import os
import re
import ssl
import subprocess
import sys
import tarfile
import tempfile
import urllib.error
import urllib.request
import zipfile
from pathlib import Path
from urllib.parse import urldefrag, urljoin

from megatron_wallfacer.kernels.signatures import Signature

_CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "megatron-wallfacer" / "published"
_SECONDS = 60


class Unreachable(Exception):
    """There is no network here, or no package index behind it."""


def published(package: str, version: str, path: str, *, wheel: bool) -> str:
    """One file of a release.

    Args:
        package, version: on the index.
        path: in the wheel, or below the top folder of the source distribution.
        wheel: from which of them.

    Raises:
        Unreachable: it is not kept here and cannot be fetched.
        KeyError: the release has no such file.
    """
    kept = _CACHE / f"{package}-{version}" / path
    if not kept.exists():
        text = _in_wheel(package, version, path) if wheel else _in_sdist(package, version, path)
        kept.parent.mkdir(parents=True, exist_ok=True)
        # Renamed into place: tests of several processes may fetch the same file.
        with tempfile.NamedTemporaryFile("w", dir=kept.parent, delete=False, encoding="utf-8") as file:
            file.write(text)
        Path(file.name).rename(kept)
    return kept.read_text(encoding="utf-8")


def _in_wheel(package: str, version: str, path: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        options = ["--no-deps", "--only-binary", ":all:", "--retries", "1", "--dest", folder]
        _pip("download", *options, f"{package}=={version}")
        (archive,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(archive) as wheel:
            return wheel.read(path).decode()


def _in_sdist(package: str, version: str, path: str) -> str:
    folder = f"{package.replace('-', '_')}-{version}"
    url, digest = _link(package, f"{folder}.tar.gz")
    content = _fetched(url)
    if hashlib.sha256(content).hexdigest() != digest:
        raise Unreachable(f"{url} is not what the index says")
    with tarfile.open(fileobj=io.BytesIO(content), mode="r:gz") as archive:
        file = archive.extractfile(f"{folder}/{path}")
        assert file is not None
        return file.read().decode()


def _link(package: str, file: str) -> tuple[str, str]:
    """Address and SHA-256 of a file on the index, by its page for the package."""
    page = f"{_index().rstrip('/')}/{package}/"
    links = re.findall(r'href="([^"]+)"[^>]*>([^<]+)</a>', _fetched(page).decode())
    found = [html.unescape(link) for link, name in links if name.strip() == file]
    if not found:
        raise Unreachable(f"{page} has no {file}")
    url, fragment = urldefrag(urljoin(page, found[0]))
    return url, fragment.removeprefix("sha256=")


def _index() -> str:
    try:
        return os.environ.get("PIP_INDEX_URL") or _pip("config", "get", "global.index-url").strip()
    except Unreachable:
        return "https://pypi.org/simple"


def _fetched(url: str) -> bytes:
    try:
        context = ssl.create_default_context(cafile=os.environ.get("PIP_CERT"))
        with urllib.request.urlopen(url, timeout=_SECONDS, context=context) as answer:
            return answer.read()
    except (urllib.error.URLError, OSError) as error:
        raise Unreachable(f"{url}: {error}") from error


def _pip(*command: str) -> str:
    try:
        done = subprocess.run(
            [sys.executable, "-m", "pip", *command], capture_output=True, text=True, timeout=2 * _SECONDS, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise Unreachable(f"pip {command[0]}: no answer") from error
    if done.returncode:
        raise Unreachable(f"pip {command[0]}: {(done.stderr.strip().splitlines() or ['failed'])[-1]}")
    return done.stdout


def read_signature(definition: ast.FunctionDef, *, owner: str, needs: str) -> Signature:
    """The signature of a function from its ``def`` statement. The function is not imported."""
    arguments = definition.args
    positional = [a.arg for a in (*arguments.posonlyargs, *arguments.args)]
    required = set(positional[: len(positional) - len(arguments.defaults)])
    pairs = zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    required |= {argument.arg for argument, default in pairs if default is None}
    names = frozenset(positional) | {argument.arg for argument in arguments.kwonlyargs}
    return Signature(owner, definition.name, names, frozenset(required), needs)
