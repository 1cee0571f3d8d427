"""What is left of a runtime that was shut down, and of calls that have ended: nothing."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import threading
import weakref
from collections.abc import Callable, Iterator

import psycopg
import pytest

from commandbus import Command, HandlerRegistry
from commandbus.errors import InvalidCommandError
from commandbus.sync import SyncCommandBus, SyncHandlerContext, SyncRuntime, SyncTroubleshootingQueue, SyncWorker
from tests.bus.support import DOMAIN, one
from tests.support import eventually
from tests.sync.support_runtime import Slow, add, fail


class Thing:
    """Something of the caller's, whose end can be seen."""


@pytest.fixture
def _no_collector() -> Iterator[None]:
    """Let objects go by their last reference only."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def descriptors() -> int:
    """How many file descriptors this process has open."""
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - names only


def sessions(db: psycopg.Connection) -> int:
    """How many connections the library has to the test's database."""
    query = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND application_name = %s"
    return int(one(db, query, "commandbus"))


def use_all(runtime: SyncRuntime, dsn: str) -> None:
    """Use every part of the library on this runtime, and close nothing."""
    bus, registry, ended = SyncCommandBus(dsn, runtime=runtime), HandlerRegistry(), threading.Event()

    @registry.handler(DOMAIN, "Debit", transactional=True)
    def debit(command: Command, context: SyncHandlerContext) -> None:
        ended.set()

    bus.send(DOMAIN, "Debit", 1)
    SyncTroubleshootingQueue(bus).count_troubleshooting()
    SyncWorker(bus, DOMAIN, registry, thread_pool_size=2).start()
    assert ended.wait(20)


def test_no_thread_task_connection_or_descriptor_is_left(dsn: str, db: psycopg.Connection) -> None:
    threads, before = set(threading.enumerate()), descriptors()
    with SyncRuntime() as runtime:
        use_all(runtime, dsn)
        loop = runtime.start()
        assert sessions(db) > 1
        assert descriptors() > before
    assert asyncio.all_tasks(loop) == set()
    assert loop.is_closed()
    eventually(lambda: set(threading.enumerate()) == threads, what="the end of the threads")
    eventually(lambda: sessions(db) == 0, what="the end of the sessions")
    assert descriptors() == before


def test_a_thousand_lives_leave_nothing_behind() -> None:
    def live() -> None:
        with SyncRuntime() as runtime:
            assert runtime.run(add, 1, 2) == 3
            with contextlib.suppress(TimeoutError):
                runtime.run(Slow(), timeout=0)

    def after(lives: int) -> tuple[int, int]:
        for _ in range(lives):
            live()
        gc.collect()
        return len(gc.get_objects()), descriptors()

    objects, open_before = after(20)
    objects_later, open_later = after(1000)
    assert open_later == open_before
    assert objects_later - objects < 500


def test_a_bus_that_is_opened_and_closed_leaves_nothing_on_its_runtime(runtime: SyncRuntime, dsn: str) -> None:
    gone = []
    for _ in range(3):
        with SyncCommandBus(dsn, runtime=runtime) as bus:
            bus.send(DOMAIN, "Debit", 1)
            gone.append(weakref.ref(bus._bus))
        del bus
    assert runtime._closers == []
    eventually(lambda: not runtime._calls)
    gc.collect()
    assert [found() for found in gone] == [None] * 3


@pytest.mark.usefixtures("_no_collector")
def test_a_runtime_that_was_shut_down_is_free_when_it_is_dropped() -> None:
    runtime = SyncRuntime()
    assert runtime.run(add, 1, 2) == 3
    runtime.shutdown()
    gone = weakref.ref(runtime)
    del runtime
    eventually(lambda: gone() is None)  # its thread may still be on its way out


def result(runtime: SyncRuntime, bus: SyncCommandBus) -> None:
    """End well."""
    runtime.run(add, 1, 2)


def failure(runtime: SyncRuntime, bus: SyncCommandBus) -> None:
    """End by the coroutine's exception."""
    runtime.run(fail)


def timeout(runtime: SyncRuntime, bus: SyncCommandBus) -> None:
    """End by a timeout."""
    runtime.run(Slow(), timeout=0.01)


def refused_send(runtime: SyncRuntime, bus: SyncCommandBus) -> None:
    """End by an exception that comes out of the send buffer."""
    bus.send(DOMAIN, "Refused", 1)


@pytest.mark.usefixtures("_no_collector")
@pytest.mark.parametrize("call", [result, failure, timeout, refused_send])
def test_a_call_keeps_nothing_of_its_caller_alive(
    runtime: SyncRuntime,
    bus: SyncCommandBus,
    db: psycopg.Connection,
    call: Callable[[SyncRuntime, SyncCommandBus], None],
) -> None:
    db.execute(
        "CREATE FUNCTION public.refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
        "RAISE EXCEPTION 'no room' USING ERRCODE = '23514'; END $$"
    )
    db.execute(
        "CREATE TRIGGER refuse BEFORE INSERT ON commandbus.command FOR EACH ROW "
        "WHEN (NEW.command_type = 'Refused') EXECUTE FUNCTION public.refuse()"
    )
    gone: list[weakref.ref[Thing]] = []

    def caller() -> None:
        thing = Thing()
        gone.append(weakref.ref(thing))
        with contextlib.suppress(LookupError, TimeoutError, InvalidCommandError):
            call(runtime, bus)
        assert thing is not None

    caller()
    eventually(lambda: gone[0]() is None, timeout=2)
