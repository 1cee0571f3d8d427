"""Every test here ends with an event loop that has nothing to complain about, and without a thread of the library."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from commandbus.sync import SyncCommandBus, SyncRuntime
from tests.support import eventually


@pytest.fixture(autouse=True)
def _quiet_loop(quiet_loop: None) -> None:
    """Ask for the one of all tests."""


@pytest.fixture(autouse=True)
def _no_thread_left(_quiet_loop: None) -> Iterator[None]:
    """See that the threads of every runtime have ended."""
    before = set(threading.enumerate())
    yield
    eventually(lambda: set(threading.enumerate()) <= before, what="the end of the threads that the test has started")


@pytest.fixture
def runtime() -> Iterator[SyncRuntime]:
    """A runtime of the test's own, shut down after it."""
    with SyncRuntime() as runtime:
        yield runtime


@pytest.fixture
def bus(runtime: SyncRuntime, dsn: str) -> SyncCommandBus:
    """A bus on the test's database, which nobody has used yet."""
    return SyncCommandBus(dsn, runtime=runtime)
