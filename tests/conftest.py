from collections.abc import Callable

import pytest

from tests.support.pool import Pool

_POOLS: dict[int, Pool] = {}


@pytest.fixture(scope="session")
def pools() -> Callable[[int], Pool]:
    """``pools(n)``: n gloo ranks, started when first asked for."""

    def pool(size: int) -> Pool:
        if size not in _POOLS:
            _POOLS[size] = Pool(size)
        return _POOLS[size]

    return pool


def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Ranks that wait for a job are not idle: gloo polls, for each group. They do not outlive their folder's tests."""
    if nextitem is None or nextitem.path.parent != item.path.parent:
        while _POOLS:
            _POOLS.popitem()[1].close()
