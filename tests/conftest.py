from collections.abc import Callable, Iterator
from functools import cache

import pytest

from tests.support.pool import Pool


@pytest.fixture(scope="session")
def pools() -> Iterator[Callable[[int], Pool]]:
    """``pools(n)``: n gloo ranks, started when first asked for."""
    made = cache(Pool)
    asked = []

    def pool(size: int) -> Pool:
        asked.append(made(size))
        return asked[-1]

    yield pool
    for workers in asked:
        workers.close()
