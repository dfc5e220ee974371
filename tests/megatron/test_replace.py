"""Names in somebody else's module are replaced strictly."""

import sys
import types

import pytest

from megatron_wallfacer.errors import WallfacerError
from megatron_wallfacer.megatron.replace import replace


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    module = types.ModuleType("wallfacer_test_host")
    module.there, module.__version__ = 1, "1.2"
    module.Kind = type("Kind", (), {"method": lambda self: 1})
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


def test_a_name_is_replaced(host: types.ModuleType) -> None:
    replace("wallfacer_test_host:there", 2)
    assert host.there == 2


def test_a_method_is_replaced(host: types.ModuleType) -> None:
    replace("wallfacer_test_host:Kind.method", lambda self: 2)
    assert host.Kind().method() == 2


@pytest.mark.parametrize("name", ["gone", "Kind.gone", "Gone.method"])
def test_a_missing_name_stops_and_is_not_created(host: types.ModuleType, name: str) -> None:
    with pytest.raises(WallfacerError, match=f"wallfacer_test_host 1.2 has no wallfacer_test_host.{name}"):
        replace(f"wallfacer_test_host:{name}", 2)
    assert not hasattr(host, "gone")
