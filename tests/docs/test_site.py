"""The site builds without a warning, without a network; the metadata beside it says what the package says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import megatron_wallfacer
from tests.docs.pages import ROOT


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    for package in ("sphinx", "myst_parser", "furo"):
        pytest.importorskip(package, reason="pip install -e '.[docs]'")
    where = [str(ROOT / "docs"), str(tmp_path / "html")]
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", "-d", str(tmp_path), *where]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    built = {path.stem for path in (tmp_path / "html").glob("*.html")}
    assert {path.stem for path in (ROOT / "docs").glob("*.md")} <= built


def test_the_citation_names_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == megatron_wallfacer.__version__
    assert citation["license"] == "Apache-2.0"
    assert citation["references"][0]["url"] == "https://arxiv.org/abs/2407.00611"
