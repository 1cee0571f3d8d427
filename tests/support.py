"""What tests share that is no fixture."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Awaitable, Callable, Iterable
from importlib.metadata import entry_points
from itertools import product
from pathlib import Path
from typing import Any, TypeVar

import psycopg
import pytest

from commandbus.embedded import EmbeddedPostgres

T = TypeVar("T")

ROOT = Path(__file__).parents[1]
"""Where `python -m tests.faults.apps.clock` and the like are found."""

PYTEST = {} if entry_points(group="pytest11", name="pytest_commandbus") else {"PYTEST_PLUGINS": "pytest_commandbus"}
"""The environment of a user's pytest: where the library is not installed, but on the path, it is told of the plugin."""

Route = dict[str, Any]
"""The arguments by which a `CommandBus` comes to the database of a test."""

direct_only = pytest.mark.parametrize("route", ["direct", "sync"], indirect=True)
"""Marks a test that looks at the sessions of the library, or at LISTEN: behind a pooler they are not there to see."""


def sync_if_long(*, pooled: bool) -> pytest.MarkDecorator:
    """Mark a test of what both halves share: the blocking one runs it with `--long` only."""
    routes = ["direct", *(["pooled"] if pooled else []), pytest.param("sync", marks=pytest.mark.long)]
    return pytest.mark.parametrize("route", routes, indirect=True)


def async_only(reason: str, *, pooled: bool = True) -> pytest.MarkDecorator:
    """Mark a test that has no meaning for the blocking half; CONTRIBUTING.md counts them by reason."""
    assert reason
    return pytest.mark.parametrize("route", ["direct", "pooled"] if pooled else ["direct"], indirect=True)


def by_route(
    name: str, given: Iterable[Any], *, sync: Iterable[Any], pooled: bool = True, indirect: bool = False
) -> pytest.MarkDecorator:
    """Parametrize with `given`, but for the blocking half with `sync`: it takes no async connection."""
    pairs = [*product(["direct", "pooled"] if pooled else ["direct"], given), *product(["sync"], sync)]
    fixtures = ["route", name] if indirect else ["route"]
    ids = [f"{route}-{each if isinstance(each, str) else ' '.join(each)}" for route, each in pairs]
    return pytest.mark.parametrize(("route", name), pairs, indirect=fixtures, ids=ids)


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


def assert_sound(request: pytest.FixtureRequest, dsn: str) -> None:
    """Fail if `verify` finds something in this database, unless the test or a mutant corrupts it on purpose."""
    if request.node.get_closest_marker("corrupts") is None and not request.config.getoption("mutant"):
        with psycopg.connect(dsn) as connection:
            found = connection.execute("SELECT * FROM commandbus.verify_v1()").fetchall()
        assert not found, f"verify found {len(found)}, the first: {found[:5]}"


def crash(server: EmbeddedPostgres) -> None:
    """An immediate shutdown: the backends drop their connections, nothing is written back; then start again."""
    halt(server)
    server.start()


def halt(server: EmbeddedPostgres) -> None:
    """An immediate shutdown, as `pg_ctl stop -m immediate` makes it; returns when nobody answers any more."""
    (pid_file,) = server.data_dir.glob("pg*/data/postmaster.pid")
    os.kill(int(pid_file.read_text("utf-8").split()[0]), signal.SIGQUIT)
    while True:
        try:
            psycopg.connect(server.dsn(), connect_timeout=2).close()
        except psycopg.OperationalError:
            return


def _never(value: object, timeout: float, what: str) -> AssertionError:
    return AssertionError(f"{what} did not come about in {timeout:g} s; last value: {value!r}")
