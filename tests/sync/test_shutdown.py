"""What `SyncRuntime.shutdown` does for the buses and workers on it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest

from commandbus import Command, CommandBus, HandlerRegistry
from commandbus.errors import ClosedError, OutcomeUnknownError
from commandbus.sync import SyncCommandBus, SyncHandlerContext, SyncRuntime, SyncWorker
from tests.bus.support import DOMAIN, Gate, ids, one
from tests.support import eventually
from tests.sync.support_runtime import in_thread


@pytest.fixture
def gate(db: psycopg.Connection) -> Iterator[Gate]:
    """A gate for sends, open at the end."""
    gate = Gate(db)
    yield gate
    gate.open()


def sessions(db: psycopg.Connection, name: str = "commandbus") -> int:
    """How many connections of the library there are."""
    query = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND application_name = %s"
    return int(one(db, query, name))


def test_a_send_under_way_is_awaited(
    runtime: SyncRuntime, bus: SyncCommandBus, gate: Gate, db: psycopg.Connection
) -> None:
    gate.shut("Slow")
    with in_thread(lambda: bus.send(DOMAIN, "Slow", 1)) as ends:
        eventually(gate.waiting)
        with in_thread(runtime.shutdown):
            gate.open()
    assert ids(db) == [end.command_id for end in ends]  # type: ignore[attr-defined]


def test_sends_that_do_not_end_in_time_are_told_apart(
    runtime: SyncRuntime, dsn: str, gate: Gate, db: psycopg.Connection
) -> None:
    bus = SyncCommandBus(dsn, runtime=runtime, flush_connections=1)
    gate.shut("Slow")
    with in_thread(lambda: bus.send(DOMAIN, "Slow", 1)) as under_way:
        eventually(gate.waiting)
        with in_thread(lambda: bus.send(DOMAIN, "Waits", 1)) as waiting:
            eventually(lambda: bus._bus._buffer._waiting)
            runtime.shutdown(timeout=0.05)
    assert [type(end) for end in under_way] == [OutcomeUnknownError]
    assert [type(end) for end in waiting] == [ClosedError]
    gate.open()
    assert one(db, "SELECT count(*) FROM commandbus.commands WHERE command_type = 'Waits'") == 0


def test_a_send_that_comes_while_others_are_awaited_is_refused(
    runtime: SyncRuntime, bus: SyncCommandBus, gate: Gate, db: psycopg.Connection
) -> None:
    gate.shut("Slow")
    with in_thread(lambda: bus.send(DOMAIN, "Slow", 1)) as ends:
        eventually(gate.waiting)
        with in_thread(runtime.shutdown):
            eventually(lambda: bus._bus._closed)
            with pytest.raises(ClosedError, match=r"the bus was closed: command .* was not sent"):
                bus.send(DOMAIN, "Late", 1)
            gate.open()
    assert ids(db) == [end.command_id for end in ends]  # type: ignore[attr-defined]


@pytest.mark.parametrize("of", ["bus", "runtime"])
def test_sends_that_keep_coming_do_not_hold_up_the_end(
    runtime: SyncRuntime, bus: SyncCommandBus, db: psycopg.Connection, caplog: pytest.LogCaptureFixture, of: str
) -> None:
    sent = []

    def hammer() -> None:
        while True:
            sent.append(bus.send(DOMAIN, "Debit", 1).command_id)

    with in_thread(hammer) as one_end, in_thread(hammer) as other_end:
        eventually(lambda: len(sent) > 50)
        if of == "bus":
            bus.close()
        runtime.shutdown()
    assert [type(end) for end in (*one_end, *other_end)] == [ClosedError] * 2
    assert "not everything was closed" not in caplog.text
    assert sorted(ids(db)) == sorted(sent)


def test_the_connections_of_its_buses_are_closed(
    runtime: SyncRuntime, bus: SyncCommandBus, db: psycopg.Connection
) -> None:
    bus.send(DOMAIN, "Debit", 1)
    assert sessions(db) > 0
    runtime.shutdown()
    eventually(lambda: sessions(db) == 0)
    with pytest.raises(ClosedError):
        bus.send(DOMAIN, "Debit", 1)


def test_handlers_that_run_may_send_and_end(runtime: SyncRuntime, bus: SyncCommandBus, db: psycopg.Connection) -> None:
    begun, go_on, registry = threading.Event(), threading.Event(), HandlerRegistry()

    @registry.handler(DOMAIN, "First")
    def first(command: Command, context: SyncHandlerContext) -> Any:  # noqa: ANN401 - any JSON
        begun.set()
        go_on.wait()
        return str(context.bus.send(DOMAIN, "Next", 1).command_id)

    SyncWorker(bus, DOMAIN, registry, thread_pool_size=1).start()
    receipt = bus.send(DOMAIN, "First", 1)
    assert begun.wait(20)
    with in_thread(runtime.shutdown):
        eventually(lambda: runtime._winding_up)
        go_on.set()
    status, result = db.execute(
        "SELECT status, result FROM commandbus.commands WHERE command_id = %s", [receipt.command_id]
    ).fetchone() or (None, None)
    assert status == "COMPLETED"
    assert {str(found) for found in ids(db)} == {str(receipt.command_id), result}


# ------------------------------------------------------------------------------------- a loop of somebody else's


@pytest.fixture
def foreign() -> Iterator[asyncio.AbstractEventLoop]:
    """A loop that runs in another thread."""
    loop = asyncio.SelectorEventLoop()
    with in_thread(loop.run_forever):
        yield loop
        loop.call_soon_threadsafe(loop.stop)
    loop.close()


def test_on_a_foreign_loop_it_closes_what_it_has_opened(
    foreign: asyncio.AbstractEventLoop, dsn: str, db: psycopg.Connection
) -> None:
    runtime = SyncRuntime.of(foreign)
    SyncCommandBus(dsn, runtime=runtime).send(DOMAIN, "Debit", 1)
    runtime.shutdown()
    eventually(lambda: sessions(db) == 0)
    assert foreign.is_running()


def test_a_bus_that_was_opened_on_the_foreign_loop_stays_open(foreign: asyncio.AbstractEventLoop, dsn: str) -> None:
    theirs = CommandBus(dsn)
    asyncio.run_coroutine_threadsafe(theirs.open(), foreign).result(20)
    runtime = SyncRuntime.of(foreign)
    with SyncCommandBus(theirs, runtime=runtime) as bus:
        receipt = bus.send(DOMAIN, "Debit", 1)
    runtime.shutdown()
    found = asyncio.run_coroutine_threadsafe(theirs.get_command(receipt), foreign).result(20)
    assert found.command_id == receipt.command_id
    asyncio.run_coroutine_threadsafe(theirs.close(), foreign).result(20)
