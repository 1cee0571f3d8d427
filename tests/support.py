"""What tests share that is no fixture."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

T = TypeVar("T")

_POLL = 0.01  # seconds between two looks


def nested(depth: int) -> list[Any]:
    """So many lists, one in the other."""
    found: list[Any] = []
    for _ in range(depth - 1):
        found = [found]
    return found


def eventually(predicate: Callable[[], T], *, timeout: float = 10.0, what: str = "the condition") -> T:
    """Wait until `predicate` returns something true, and return that.

    Fails with the last value after `timeout` seconds. What the predicate raises is raised at once.
    """
    deadline = time.monotonic() + timeout
    while True:
        value = predicate()
        if value:
            return value
        if time.monotonic() >= deadline:
            raise _never(value, timeout, what)
        time.sleep(_POLL)


async def aeventually(
    predicate: Callable[[], Awaitable[T]], *, timeout: float = 10.0, what: str = "the condition"
) -> T:
    """Do what `eventually` does, with a coroutine function, on the running loop."""
    deadline = time.monotonic() + timeout
    while True:
        value = await predicate()
        if value:
            return value
        if time.monotonic() >= deadline:
            raise _never(value, timeout, what)
        await asyncio.sleep(_POLL)


def _never(value: object, timeout: float, what: str) -> AssertionError:
    return AssertionError(f"{what} did not come about in {timeout:g} s; last value: {value!r}")
