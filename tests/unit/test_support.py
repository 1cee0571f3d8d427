"""`eventually` waits, returns what came, and fails with what it saw last."""

from __future__ import annotations

import pytest

from tests.support import aeventually, eventually


def test_the_first_true_value_is_returned() -> None:
    values = iter([0, None, 3, 4])
    assert eventually(lambda: next(values)) == 3


def test_the_failure_tells_the_last_value() -> None:
    with pytest.raises(AssertionError, match=r"a row did not come about in 0\.02 s; last value: \[\]"):
        eventually(list, timeout=0.02, what="a row")


async def test_the_async_twin_does_the_same() -> None:
    values = iter([0, 3])

    async def predicate() -> int:
        return next(values, 0)

    assert await aeventually(predicate) == 3
    with pytest.raises(AssertionError, match="last value: 0"):
        await aeventually(predicate, timeout=0.02)
