"""`RetryPolicy`: how long a command waits after which attempt."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from commandbus import ConfigurationError, RetryPolicy

SECOND = timedelta(seconds=1)


def test_the_defaults() -> None:
    policy = RetryPolicy()
    assert policy.max_attempts == 4
    assert list(policy.backoff) == [10 * SECOND, 60 * SECOND, 300 * SECOND]


def test_the_last_wait_repeats() -> None:
    policy = RetryPolicy(9, [SECOND, 5 * SECOND], jitter=0)
    assert [policy.wait_after(attempt) / SECOND for attempt in (1, 2, 3, 8)] == [1, 5, 5, 5]


@given(attempt=st.integers(1, 1000), jitter=st.floats(0, 1))
def test_jitter_spreads_around_the_wait(attempt: int, jitter: float) -> None:
    wait = RetryPolicy(3, [10 * SECOND], jitter=jitter).wait_after(attempt)
    assert timedelta(0) <= wait
    assert abs(wait / SECOND - 10) <= 10 * jitter + 1e-5


def test_jitter_does_spread() -> None:
    assert len({RetryPolicy().wait_after(1) for _ in range(20)}) > 10


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_attempts": 0},
        {"backoff": []},
        {"backoff": [SECOND, -SECOND]},
        {"jitter": -0.1},
        {"jitter": 1.1},
    ],
    ids=["no attempt", "no wait", "a wait below zero", "jitter below 0", "jitter above 1"],
)
def test_what_makes_no_sense_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(wrong))):
        RetryPolicy(**wrong)
