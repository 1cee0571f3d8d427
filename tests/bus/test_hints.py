"""Hints to workers: the first at once, few of them, and none from within the caller's transaction."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from math import inf

import psycopg
import pytest
import uvloop

from commandbus import CommandBus, SendRequest, _hints
from tests.bus.support import DOMAIN, Connection
from tests.support import Route, async_only


@pytest.fixture
def hints(db: Connection) -> Connection:
    """A connection that listens."""
    db.execute("LISTEN commandbus")
    return db


def until_marker(hints: Connection) -> list[str]:
    """All hints up to the marker."""
    found: list[str] = []
    for hint in hints.notifies(timeout=20):
        if hint.payload == "marker":
            return found
        found.append(hint.payload)
    raise AssertionError(f"the marker did not come; only {found}")


async def next_hint(hints: Connection) -> str:
    """The next hint, waited for without holding up the loop."""
    (hint,) = await asyncio.to_thread(lambda: list(hints.notifies(timeout=20, stop_after=1)))
    return hint.payload


async def test_the_first_is_given_at_once(bus: CommandBus, hints: Connection) -> None:
    await bus.send(DOMAIN, "Debit", {})
    assert await next_hint(hints) == DOMAIN


async def test_under_load_there_are_at_most_ten_a_second(
    bus: CommandBus, hints: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_hints, "_MANY", 1.0)  # what this machine can send may be no load
    began = time.monotonic()
    for n in range(300):
        await bus.send(DOMAIN, "Debit", n)
        await bus.send("shipping", "Ship", n)
    await bus.wake("marker")
    seconds = time.monotonic() - began
    count = Counter(until_marker(hints))
    assert set(count) == {DOMAIN, "shipping"}
    assert max(count.values()) <= 3 + 12 * seconds  # and some for the edges


@async_only("those of threads are looked at every 10 ms")
async def test_without_load_single_sends_get_one_each(
    bus: CommandBus, hints: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_hints, "_MANY", inf)
    monkeypatch.setattr(_hints, "LIGHT", 0.0)  # however fast this machine sends
    for n in range(20):
        await bus.send(DOMAIN, "Debit", n)
    found = await asyncio.to_thread(lambda: list(hints.notifies(timeout=20, stop_after=20)))
    assert [hint.payload for hint in found] == [DOMAIN] * 20


async def test_the_last_of_a_burst_is_not_left_without(bus: CommandBus, hints: Connection) -> None:
    await bus.send(DOMAIN, "Debit", 1)
    assert await next_hint(hints) == DOMAIN
    await bus.send(DOMAIN, "Debit", 2)
    assert await next_hint(hints) == DOMAIN


async def test_a_batch_gives_one_a_domain(bus: CommandBus, hints: Connection) -> None:
    domains = [DOMAIN, "shipping", DOMAIN]
    await bus.send_batch([SendRequest(domain, "Debit", {}) for domain in domains * 30])  # one flush
    given = await asyncio.to_thread(lambda: [hint.payload for hint in hints.notifies(timeout=10, stop_after=2)])
    await bus.wake("marker")
    assert sorted(given + until_marker(hints)) == [DOMAIN, "shipping"]


async def test_a_send_on_a_connection_gives_none_until_it_is_asked(
    bus: CommandBus, hints: Connection, dsn: str
) -> None:
    with psycopg.connect(dsn) as connection:
        await bus.send(DOMAIN, "Debit", {}, connection=connection)
        await bus.send_batch([SendRequest(DOMAIN, "Debit", {})], connection=connection)
    await bus.wake("marker")
    assert until_marker(hints) == []
    await bus.wake(DOMAIN, "shipping")
    await bus.wake("marker")
    assert until_marker(hints) == [DOMAIN, "shipping"]


async def test_closing_drops_what_is_owed(route: Route, hints: Connection) -> None:
    for _ in range(3):
        async with CommandBus(**route) as bus:
            await bus.send(DOMAIN, "Debit", 1)
            await bus.send(DOMAIN, "Debit", 2)
    async with CommandBus(**route) as bus:
        await bus.wake("marker")
    assert len(until_marker(hints)) >= 3


def test_on_uvloop_a_second_timer_may_follow_one_that_is_due_at_once(dsn: str) -> None:
    async def owe_twice() -> None:
        async with CommandBus(dsn) as bus:
            bus._hints._start_timer(0.0001)
            bus._hints._start_timer(0.0001)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(owe_twice())
