from collections.abc import Callable, Iterator

import pytest
from hypothesis import settings

from tests.support.machine import shared
from tests.support.pool import Pool

# Properties are about results; the time that one example takes depends on what else the machine does.
settings.register_profile("any machine", deadline=None)
settings.load_profile("any machine")

_POOLS: dict[int, Pool] = {}
#: Ranks that may wait beside those of the test that runs.
_WAITING = 20


@pytest.fixture(scope="session")
def pools() -> Callable[[int], Pool]:
    """``pools(n)``: n gloo ranks, started when first asked for."""

    def pool(size: int) -> Pool:
        # The one that was used last stands last; the first ones go.
        chosen = _POOLS.pop(size, None)
        while sum(_POOLS) > _WAITING:
            _POOLS.pop(next(iter(_POOLS))).close()
        _POOLS[size] = chosen or Pool(size)
        return _POOLS[size]

    return pool


#: Files that take longest, and so come first: none of them is to begin when all others are done.
_LONG = ("engine/test_exactness.py", "slurm/test_cluster.py", "megatron/test_parity.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: next((i for i, name in enumerate(_LONG) if str(item.path).endswith(name)), len(_LONG)))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    with shared(alone=item.get_closest_marker("alone") is not None):
        return (yield)


def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Ranks that wait for a job are not idle: gloo polls, for each group. They do not outlive their folder's tests."""
    if nextitem is None or nextitem.path.parent != item.path.parent:
        while _POOLS:
            _POOLS.popitem()[1].close()
