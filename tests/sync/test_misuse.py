"""Blocking calls where they would block what they wait for, and where they only seem to."""

from __future__ import annotations

import asyncio
import sys
import threading
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import psycopg
import pytest

from commandbus import Command, CommandBus, CommandStatus, HandlerContext, HandlerRegistry, SendRequest, Worker
from commandbus.errors import ClosedError, ConfigurationError, SyncInAsyncError, WrongLoopError
from commandbus.sync import SyncCommandBus, SyncHandlerContext, SyncRuntime, SyncTroubleshootingQueue, SyncWorker
from tests.bus.support import DOMAIN, ids
from tests.support import eventually
from tests.sync.support_runtime import add

PARKED = CommandStatus.IN_TROUBLESHOOTING_QUEUE


@pytest.fixture
def lenient(monkeypatch: pytest.MonkeyPatch) -> Iterator[SyncRuntime]:
    """A runtime that takes its policy from the environment: allow."""
    monkeypatch.setenv("COMMAND_BUS_ON_ASYNC", "allow")
    with SyncRuntime() as runtime:
        yield runtime


def finished(bus: SyncCommandBus, count: int) -> None:
    """Come back when so many commands are finished or parked."""
    eventually(
        lambda: sum(command.status.terminal or command.status == PARKED for command in bus.query_commands()) >= count,
        timeout=30,
        what=f"the end of {count} commands",
    )


# --------------------------------------------------------------------------------- in a thread with an event loop


async def test_a_call_beside_a_running_loop_names_what_to_await(bus: SyncCommandBus, runtime: SyncRuntime) -> None:
    with pytest.raises(SyncInAsyncError, match=r"`await CommandBus\.send`"):
        bus.send(DOMAIN, "Debit", 1)
    with pytest.raises(SyncInAsyncError, match=r"`await CommandBus\.get_command`"):
        bus.get_command(DOMAIN)
    with pytest.raises(SyncInAsyncError, match=r"`await TroubleshootingQueue\.count_troubleshooting`"):
        SyncTroubleshootingQueue(bus).count_troubleshooting()
    with pytest.raises(SyncInAsyncError, match=r"`await CommandBus\.open`"), bus:
        pass
    with pytest.raises(SyncInAsyncError, match="`await add`"):
        runtime.run(add, 1, 2)
    with pytest.raises(SyncInAsyncError, match="`await add`"):
        runtime.run(add(1, 2))


async def test_it_can_be_allowed(lenient: SyncRuntime, dsn: str) -> None:
    bus = SyncCommandBus(dsn, runtime=lenient)
    receipt = bus.send(DOMAIN, "Debit", 1)
    assert bus.get_command(receipt).data == 1


async def test_it_can_be_warned_of_once_a_call_and_at_the_callers_line(dsn: str) -> None:
    with SyncRuntime(on_async="warn") as runtime, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        bus = SyncCommandBus(dsn, runtime=runtime)
        receipt = bus.send(DOMAIN, "Debit", 1)
        bus.get_command(receipt)
        SyncTroubleshootingQueue(bus).count_troubleshooting()
        runtime.run(add, 1, 2)
    found = [(str(one.message), one.filename) for one in caught if one.category is RuntimeWarning]
    names = ["CommandBus.send", "CommandBus.get_command", "TroubleshootingQueue.count_troubleshooting", "add"]
    assert found == [
        (f"a blocking call stops the event loop of this thread: `await {name}` there", __file__) for name in names
    ]


async def test_from_its_own_loop_it_is_never_allowed(lenient: SyncRuntime) -> None:
    async def call() -> int:
        return lenient.run(add, 1, 2)

    with pytest.raises(SyncInAsyncError, match="would wait for itself: `await add`"):
        lenient.run(call)


async def test_in_a_notebook_it_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    shell = SimpleNamespace(kernel=object())  # each cell runs under the loop of the kernel
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    with SyncRuntime() as runtime:
        assert runtime.run(add, 1, 2) == 3


@pytest.mark.parametrize("shell", [None, SimpleNamespace()], ids=["imported only", "terminal"])
async def test_ipython_without_a_kernel_is_no_notebook(monkeypatch: pytest.MonkeyPatch, shell: object) -> None:
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    with SyncRuntime() as runtime, pytest.raises(SyncInAsyncError):
        runtime.run(add, 1, 2)


def test_an_invalid_policy_names_where_it_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigurationError, match="on_async is 'maybe': it must be one of raise, warn, allow"):
        SyncRuntime(on_async="maybe")
    monkeypatch.setenv("COMMAND_BUS_ON_ASYNC", "never")
    with pytest.raises(ConfigurationError, match="COMMAND_BUS_ON_ASYNC is 'never'"):
        SyncRuntime()


# ---------------------------------------------------------------------------------------------- buses and their loops


async def test_a_bus_that_is_open_on_another_loop_is_refused(dsn: str, lenient: SyncRuntime) -> None:
    async with CommandBus(dsn) as theirs:
        bus = SyncCommandBus(theirs, runtime=lenient)
        with pytest.raises(WrongLoopError, match=r"SyncRuntime\.of\(loop\)"):
            bus.send(DOMAIN, "Debit", 1)
        bus.close()
        await theirs.send(DOMAIN, "Debit", 1)  # it is unharmed


def test_a_bus_that_nobody_has_opened_is_opened_here(dsn: str, runtime: SyncRuntime) -> None:
    bus = SyncCommandBus(CommandBus(dsn), runtime=runtime)
    assert bus.count() == 0


def test_a_bus_that_was_closed_says_so(bus: SyncCommandBus) -> None:
    bus.send(DOMAIN, "Debit", 1)
    bus.close()
    bus.close()
    with pytest.raises(ClosedError, match="this bus was closed: make a new one"):
        bus.send(DOMAIN, "Debit", 1)


# -------------------------------------------------------------------------------------------------------- in handlers


def test_in_an_async_handler_the_blocking_bus_names_what_to_await(bus: SyncCommandBus) -> None:
    registry = HandlerRegistry()

    @registry.handler(DOMAIN, "Relay")
    async def relay(command: Command, context: HandlerContext) -> str:
        try:
            bus.send(DOMAIN, "Next", 1)
        except SyncInAsyncError as error:
            await context.bus.send("elsewhere", "Next", 1)
            return str(error)
        return "sent"

    with SyncWorker(bus, DOMAIN, registry):
        receipt = bus.send(DOMAIN, "Relay", 1)
        finished(bus, 1)
    assert "would wait for itself: `await CommandBus.send`" in str(bus.get_command(receipt).result)


def test_eight_handlers_send_200_commands_each_on_the_runtime_that_runs_them(
    bus: SyncCommandBus, runtime: SyncRuntime, db: psycopg.Connection
) -> None:
    runtime.start().set_default_executor(ThreadPoolExecutor(1))
    registry, together = HandlerRegistry(), threading.Barrier(8)

    @registry.handler(DOMAIN, "Split")
    def split(command: Command, context: SyncHandlerContext) -> int:
        together.wait(30)
        for number in range(200):
            context.bus.send("elsewhere", "Part", number)
        return context.bus.get_command(DOMAIN, command.command_id).delivery

    with SyncWorker(bus, DOMAIN, registry, thread_pool_size=8):
        receipts = bus.send_batch([SendRequest(DOMAIN, "Split", None)] * 8)
        finished(bus, 8)
    assert [bus.get_command(receipt).result for receipt in receipts] == [1] * 8
    assert len(ids(db)) == 8 + 8 * 200


def test_a_handler_cannot_shut_down_the_loop_that_it_runs_on(bus: SyncCommandBus, runtime: SyncRuntime) -> None:
    registry = HandlerRegistry()

    @registry.handler(DOMAIN, "End")
    async def end(command: Command, context: HandlerContext) -> str:
        try:
            runtime.shutdown()
        except SyncInAsyncError as error:
            return str(error)
        return "it was"

    with SyncWorker(bus, DOMAIN, registry):
        receipt = bus.send(DOMAIN, "End", 1)
        finished(bus, 1)
    assert "own loop" in str(bus.get_command(receipt).result)


# --------------------------------------------------------------------------------------------------------- exceptions


def test_each_of_fifty_threads_gets_an_exception_of_its_own(bus: SyncCommandBus, db: psycopg.Connection) -> None:
    db.execute(
        "CREATE FUNCTION public.refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
        "RAISE EXCEPTION 'no room' USING ERRCODE = 'XX001'; END $$"
    )
    db.execute("CREATE TRIGGER refuse BEFORE INSERT ON commandbus.command EXECUTE FUNCTION public.refuse()")
    together = threading.Barrier(50)

    def send(number: int) -> BaseException | None:
        together.wait()
        try:
            bus.send(DOMAIN, "Debit", number)
        except psycopg.Error as error:
            return error
        return None

    bus.open()
    with ThreadPoolExecutor(50) as pool:
        errors = [error for error in pool.map(send, range(50)) if error is not None]
    assert len({id(error) for error in errors}) == 50
    depths = set()
    for error in errors:
        frames, traceback = 0, error.__traceback__
        while traceback is not None:
            frames, traceback = frames + 1, traceback.tb_next
        depths.add(frames)
    assert depths == {4}  # send here, send of the bus, _deliver, result


def test_nothing_is_left_to_be_awaited(runtime: SyncRuntime) -> None:
    runtime.shutdown()
    coroutine = add(1, 2)
    with pytest.raises(ClosedError):
        runtime.run(coroutine)
    with pytest.raises(RuntimeError, match="cannot reuse already awaited coroutine"):
        asyncio.run(coroutine)


def test_each_worker_takes_the_bus_of_its_half(dsn: str, runtime: SyncRuntime) -> None:
    registry = HandlerRegistry()
    registry.handler(DOMAIN, "Debit")(lambda command, context: None)
    with SyncCommandBus(dsn, runtime=runtime) as blocking:
        mixed: Any = blocking
        with pytest.raises(ConfigurationError, match="bus is a SyncCommandBus: a Worker needs a CommandBus"):
            Worker(mixed, DOMAIN, registry)
    other: Any = CommandBus(dsn)
    with pytest.raises(ConfigurationError, match="bus is a CommandBus: a SyncWorker needs a SyncCommandBus"):
        SyncWorker(other, DOMAIN, registry)
