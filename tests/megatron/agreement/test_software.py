"""Digests of code and versions of libraries."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_wallfacer.megatron.agreement import software


def test_the_digest_follows_the_code_and_not_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digests = []
    for place, text in (("a", "x = 1"), ("b", "x = 1"), ("c", "x = 2")):
        package = tmp_path / place / f"only_{place}"
        package.mkdir(parents=True)
        (package / "__init__.py").touch()
        (package / "module.py").write_text(text)
        monkeypatch.syspath_prepend(tmp_path / place)
        digests.append(software.digest(f"only_{place}"))
    assert digests[0] == digests[1] != digests[2]
    assert software.digest("no_such_package") is None


def test_what_is_compared_is_there() -> None:
    found = software.code()
    assert all(found[name] for name in ("megatron-wallfacer of SHA-256", "megatron.core of SHA-256", "torch of commit"))
    assert software.labels("0.19.2")["megatron-core"] == "0.19.2"
    assert software.version("torch")
    assert software.version("no-such-distribution") is None
