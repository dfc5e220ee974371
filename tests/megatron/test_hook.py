"""A hook is strict: it finds exactly what it was written for, or stops and says what it found."""

import sys
import types
from collections.abc import Iterator

import pytest

from megatron_wallfacer.errors import WallfacerError
from megatron_wallfacer.megatron.hook import Hook

VERSION = (0, 19, 2)


@pytest.fixture
def host() -> Iterator[types.ModuleType]:
    """A module that stands for a part of Megatron."""
    module = types.ModuleType("wallfacer_test_host")

    class Provider:
        def core_attention(self) -> str:
            return "original"

    module.Provider = Provider
    module.parse = lambda parser, extra=None: ("original", parser)
    sys.modules[module.__name__] = module
    yield module
    del sys.modules[module.__name__]


def hook(target: str, parameters: tuple[str, ...] = ()) -> Hook:
    return Hook(
        name="test",
        purpose="is tested",
        target=f"wallfacer_test_host:{target}",
        since=(0, 13),
        until=(0, 20),
        parameters=parameters,
        run=lambda original, *args, **kwargs: ("wrapped", original(*args, **kwargs)),
    )


def test_apply_wraps_a_function_and_undo_restores_it(host: types.ModuleType) -> None:
    original, wrapped = host.parse, hook("parse", ("parser",))
    wrapped.apply(VERSION)
    assert host.parse("p") == ("wrapped", ("original", "p"))
    wrapped.undo(VERSION)
    assert host.parse is original


def test_apply_wraps_a_method(host: types.ModuleType) -> None:
    hook("Provider.core_attention", ("self",)).apply(VERSION)
    assert host.Provider().core_attention() == ("wrapped", "original")


def test_a_version_that_it_is_not_for_is_rejected_unless_untested_ones_may_be_tried(
    host: types.ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WALLFACER_ALLOW_UNTESTED", raising=False)
    with pytest.raises(
        WallfacerError, match=r"0\.20\.0: wallfacer_test_host:parse is known from 0\.13 to before 0\.20 only"
    ):
        hook("parse").apply((0, 20, 0))
    monkeypatch.setenv("WALLFACER_ALLOW_UNTESTED", "1")
    hook("parse").apply((0, 20, 0))
    assert host.parse("p") == ("wrapped", ("original", "p"))


def test_applying_twice_wraps_once(host: types.ModuleType) -> None:
    once = hook("parse")
    once.apply(VERSION)
    once.apply(VERSION)
    assert host.parse("p") == ("wrapped", ("original", "p"))


@pytest.mark.parametrize("target", ["gone", "Gone.core_attention", "Provider.gone"])
def test_a_missing_target_names_version_target_and_remedy(host: types.ModuleType, target: str) -> None:
    with pytest.raises(WallfacerError, match=r"0\.19\.2: wallfacer_test_host:.* does not exist; use megatron-core"):
        hook(target).apply(VERSION)


def test_a_missing_module_names_version_target_and_remedy() -> None:
    missing = Hook(print, "test", "is tested", "wallfacer_no_such_module:f", (0, 13), until=(0, 20))
    with pytest.raises(WallfacerError, match="does not exist"):
        missing.apply(VERSION)


def test_a_changed_signature_names_the_parameter(host: types.ModuleType) -> None:
    with pytest.raises(WallfacerError, match="has no parameter context_parallel_size"):
        hook("parse", ("parser", "context_parallel_size")).apply(VERSION)
    assert host.parse("p") == ("original", "p")


def test_verify_notices_that_another_patch_took_the_place(host: types.ModuleType) -> None:
    ours = hook("parse")
    ours.apply(VERSION)
    ours.verify(VERSION)
    host.parse = lambda parser: None
    with pytest.raises(WallfacerError, match="another patch has replaced it"):
        ours.verify(VERSION)


def test_verify_fails_before_apply(host: types.ModuleType) -> None:
    with pytest.raises(WallfacerError):
        hook("parse").verify(VERSION)
