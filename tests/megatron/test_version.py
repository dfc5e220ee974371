"""The version is read without importing Megatron, and only supported ones pass."""

from pathlib import Path

import pytest

from megatron_wallfacer.errors import WallfacerError
from megatron_wallfacer.megatron import version
from megatron_wallfacer.megatron.releases import RELEASES, UNTIL

LAUNCHED = [one.number for one in RELEASES if one.launcher]


def test_the_installed_version_is_read() -> None:
    assert version.megatron_version()[:2] in LAUNCHED


def test_package_info_is_parsed_and_not_executed(tmp_path: Path) -> None:
    info = tmp_path / "package_info.py"
    info.write_text("MAJOR = 0\nMINOR = 18\nPATCH = 2\nraise SystemExit('executed')\n")
    assert version._read_version(info) == (0, 18, 2)


def test_a_package_info_without_numbers_is_rejected(tmp_path: Path) -> None:
    info = tmp_path / "package_info.py"
    info.write_text("MAJOR = 0\n")
    with pytest.raises(WallfacerError, match="has no MINOR"):
        version._read_version(info)


@pytest.mark.parametrize("supported", [(*number, 1) for number in LAUNCHED])
def test_supported_versions_pass(supported: version.Version) -> None:
    version.check_supported(supported)


@pytest.mark.parametrize("other", [(0, 12, 3), (0, 16, 1), (*UNTIL, 0), (1, 0, 0)])
def test_other_versions_are_rejected_with_the_way_out(other: version.Version, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(version.ALLOW_UNTESTED, raising=False)
    with pytest.raises(WallfacerError, match=r"is not supported: use megatron-core 0\.17.*WALLFACER_ALLOW_UNTESTED=1"):
        version.check_supported(other)


def test_an_untested_version_can_be_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(version.ALLOW_UNTESTED, "1")
    version.check_supported((*UNTIL, 0))
