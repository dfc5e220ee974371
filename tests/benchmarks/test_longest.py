"""The table of longest sequences."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import longest

PAGE = (Path(__file__).parents[2] / "docs" / "planning.md").read_text()


@pytest.mark.parametrize("model", longest.MODELS)
def test_rows_of_the_page_are_printed(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Those of one device, which take a second."""
    assert longest.main(["--model", model, "--devices", "1"]) == 0
    printed = capsys.readouterr().out
    assert len(printed.splitlines()) == 3
    assert printed.splitlines()[2] in PAGE.splitlines()


def test_clusters() -> None:
    sizes = [(cluster.nodes, cluster.gpus_per_node, cluster.nics) for cluster in map(longest.cluster_of, (1, 8, 64))]
    assert sizes == [(1, 1, 1), (1, 8, 8), (8, 8, 8)]
