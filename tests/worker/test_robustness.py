"""What once brought a worker to its knees: two cancels, dead helpers, hung handlers, failing hooks, large results."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from datetime import timedelta
from types import TracebackType
from typing import Any

import pytest

from commandbus import (
    BusinessRuleError,
    Command,
    CommandBus,
    CommandStatus,
    HandlerContext,
    HandlerRegistry,
    PermanentCommandError,
    RetryPolicy,
    SendRequest,
    Worker,
    _calls,
)
from commandbus._calls import Call, Round
from commandbus._limits import MAX_BYTES
from commandbus._listener import Listener
from commandbus.worker.claimer import Claimer
from commandbus.worker.finisher import Finisher
from commandbus.worker.housekeeper import Housekeeper
from commandbus.worker.renewer import Renewer
from tests.bus.support import DOMAIN, Connection, one, until
from tests.support import Route, async_only, direct_only
from tests.worker.support import (
    AT_ONCE,
    HOUR,
    LEASE,
    PARKED,
    Watched,
    all_settled,
    echo,
    registry_of,
    running,
    settled,
    story,
)


def transactional(**handlers: Callable[[Command, HandlerContext], Any]) -> HandlerRegistry:
    """A registry with these functions, as transactional handlers."""
    registry = HandlerRegistry()
    for command_type, function in handlers.items():
        registry.handler(DOMAIN, command_type, transactional=True, retry=AT_ONCE)(function)
    return registry


def renews(worker: Worker) -> bool:
    """Whether the thread that renews the leases of this worker lives."""
    return any(thread.name == f"{worker.name}-renewer" for thread in threading.enumerate())


async def run_out(db: Connection) -> None:
    """Come back when the one lease there is has run out, by itself."""
    sql = "SELECT lease_until < clock_timestamp() FROM commandbus.command WHERE status = 'IN_PROGRESS'"
    await until(lambda: one(db, sql), "the end of the lease")


# ------------------------------------------------------------------------------------------ the end of a worker


@async_only("cancels a task")
async def test_a_second_cancel_while_it_winds_up_leaves_nothing_that_renews(bus: CommandBus, db: Connection) -> None:
    ending, go_on, ended = asyncio.Event(), asyncio.Event(), asyncio.Event()
    watched = Watched()

    async def stubborn(command: Command, context: HandlerContext) -> None:
        try:
            await watched(command, context)
        finally:
            ending.set()
            await go_on.wait()
            ended.set()

    worker = Worker(bus, DOMAIN, registry_of(Debit=stubborn), lease=LEASE)
    task = asyncio.create_task(worker.run())
    receipt = await bus.send(DOMAIN, "Debit", {})
    await watched.started()
    task.cancel()
    await ending.wait()
    assert renews(worker)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(task, 20)
    await until(lambda: not renews(worker), "the end of the renewals")
    await run_out(db)
    async with running(Worker(bus, DOMAIN, registry_of(Debit=echo))):
        command = await settled(bus, receipt)
    assert (command.status, command.delivery, command.crashes) == (CommandStatus.COMPLETED, 2, 1)
    go_on.set()
    await ended.wait()


HELPERS = {
    "finisher": (Finisher, "run"),
    "housekeeper": (Housekeeper, "run"),
    "listener": (Listener, "run"),
    "renewer": (Renewer, "_renew"),
}


@direct_only  # a pooled worker has no listener
@pytest.mark.parametrize("helper", HELPERS)
async def test_a_helper_that_dies_stops_the_worker(
    bus: CommandBus, db: Connection, monkeypatch: pytest.MonkeyPatch, helper: str
) -> None:
    fatal, watched = threading.Event(), Watched()

    async def die(*_: object) -> None:
        while not fatal.is_set():  # noqa: ASYNC110 - of a thread; the renewer has a loop of its own
            await asyncio.sleep(0.01)
        raise RuntimeError(f"the {helper} is broken")

    monkeypatch.setattr(*HELPERS[helper], die)
    worker = Worker(bus, DOMAIN, registry_of(Debit=watched.handler), lease=LEASE, grace=HOUR)
    task = asyncio.create_task(worker.run())
    receipt = await bus.send(DOMAIN, "Debit", {})
    await watched.started()
    fatal.set()
    with pytest.raises(RuntimeError, match=f"the {helper} is broken"):
        await asyncio.wait_for(task, 30)
    assert not renews(worker)
    assert watched.cancelled == 1
    if helper == "finisher":  # nobody is left to give it back
        await run_out(db)
    else:
        command = await bus.get_command(receipt)
        assert (command.status, command.attempts, command.crashes) == (CommandStatus.PENDING, 0, 0)


# ---------------------------------------------------------------------------------------- what does not end


@pytest.mark.corrupts  # two crashes are invented
async def test_a_handler_that_never_ends_keeps_nobody_from_being_claimed(
    bus: CommandBus, db: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A command that crashed twice waits for an idle worker; the worker does not wait for it without bound."""
    patience: list[float] = []
    idle_within = Claimer._idle_within

    async def noting(self: Claimer, seconds: float | None) -> bool:
        if seconds is not None:
            patience.append(seconds)
        return await idle_within(self, seconds)

    monkeypatch.setattr(Claimer, "_idle_within", noting)
    hung = Watched()
    async with running(Worker(bus, DOMAIN, registry_of(Hung=hung.handler, Lonely=echo, Debit=echo), lease=LEASE)):
        stays = await bus.send(DOMAIN, "Hung", {})
        await hung.started()
        waits = await bus.send(DOMAIN, "Lonely", {}, delay=HOUR)
        db.execute(
            "UPDATE commandbus.command SET status = 'PENDING', due_at = NULL, crashes = 2, "
            "alone_since = clock_timestamp() - interval '2 s' WHERE command_type = 'Lonely'"
        )
        for tries in (1, 2):
            await until(lambda: len(patience) >= tries, "the wait for the others to end")  # noqa: B023 - awaited here
            sent = await bus.send_batch([SendRequest(DOMAIN, "Debit", n) for n in range(20)])
            assert {command.status for command in await all_settled(bus, sent)} == {CommandStatus.COMPLETED}
        assert patience[:2] == [LEASE.total_seconds(), 2 * LEASE.total_seconds()]
        assert (await bus.get_command(waits)).status == CommandStatus.PENDING
        hung.go_on.set()
        assert [command.status for command in await all_settled(bus, [stays, waits])] == ["COMPLETED"] * 2


# --------------------------------------------------------------------------------------- what handlers raise


class Odd(BaseException):
    """No Exception: what eventlet's Timeout and pytest's own outcomes are."""


ODD: dict[str, tuple[Callable[[], BaseException], str]] = {
    "own": (lambda: Odd("odd"), "Odd"),
    "GeneratorExit": (GeneratorExit, "GeneratorExit"),
    "KeyboardInterrupt": (KeyboardInterrupt, "KeyboardInterrupt"),
    "group": (lambda: BaseExceptionGroup("several", [Odd("1"), ValueError("2")]), "BaseExceptionGroup"),
}


@pytest.mark.parametrize("colour", ["async", "def", "to_thread", "transactional"])
@pytest.mark.parametrize("name", ODD)
async def test_what_is_no_exception_costs_an_attempt_all_the_same(bus: CommandBus, name: str, colour: str) -> None:
    def in_a_thread(command: Command, context: HandlerContext) -> None:
        raise ODD[name][0]()  # noqa: RSE102 - it makes one

    async def on_the_loop(command: Command, context: HandlerContext) -> None:
        if colour == "to_thread":
            await asyncio.to_thread(in_a_thread, command, context)
        raise ODD[name][0]()  # noqa: RSE102 - it makes one

    function = in_a_thread if colour == "def" else on_the_loop
    registry = transactional(Debit=function) if colour == "transactional" else registry_of(Debit=function)
    async with running(Worker(bus, DOMAIN, registry)):
        receipt = await bus.send(DOMAIN, "Debit", {}, max_attempts=2)
        command = await settled(bus, receipt)
    assert (command.status, command.attempts, command.crashes, command.delivery) == (PARKED, 2, 0, 2)
    assert command.error is not None
    assert command.error.code == ODD[name][1]
    assert "RELEASED" not in await story(bus, receipt)


# --------------------------------------------------------------------------------------------- what hooks do


class Hook:
    """A tracing hook that misbehaves in one place, and the context manager it returns."""

    def __init__(self, fault: str) -> None:
        self._fault = fault

    def _perhaps(self, place: str) -> None:
        if self._fault == place:
            raise RuntimeError(f"{place} is broken")

    def inject(self, headers: dict[str, str]) -> None:
        return

    def activate(self, headers: Mapping[str, str]) -> AbstractContextManager[object]:
        self._perhaps("activate")
        return self

    def __enter__(self) -> None:
        self._perhaps("__enter__")

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> bool:
        self._perhaps("__exit__")
        return self._fault == "suppresses"


@pytest.mark.parametrize("fault", ["activate", "__enter__", "__exit__", "suppresses"])
async def test_a_tracing_hook_changes_no_ending(route: Route, caplog: pytest.LogCaptureFixture, fault: str) -> None:
    def in_a_thread(command: Command, context: HandlerContext) -> Any:  # noqa: ANN401 - any JSON
        return command.data

    async def broken(command: Command, context: HandlerContext) -> None:
        raise PermanentCommandError("BROKEN", "it is")

    registry = transactional(Together=echo, TogetherBroken=broken)
    for command_type, function in {"Async": echo, "Def": in_a_thread, "Broken": broken}.items():
        registry.handler(DOMAIN, command_type)(function)
    async with CommandBus(**route, tracing=Hook(fault)) as bus, running(Worker(bus, DOMAIN, registry)):
        good = [await bus.send(DOMAIN, name, name) for name in ("Async", "Def", "Together")]
        bad = [await bus.send(DOMAIN, name, name) for name in ("Broken", "TogetherBroken")]
        for command in await all_settled(bus, good):
            assert (command.status, command.result, command.delivery) == ("COMPLETED", command.data, 1)
        for command in await all_settled(bus, bad):
            assert (command.status, command.attempts, command.delivery) == (PARKED, 1, 1)
            assert command.error is not None
            assert command.error.code == "BROKEN"
    told = [record for record in caplog.records if record.getMessage() == "the tracing hook failed"]
    assert len(told) == (0 if fault == "suppresses" else 5)


# -------------------------------------------------------------------------------------------- large results


async def test_results_just_small_enough_are_recorded_though_they_end_together(
    bus: CommandBus, monkeypatch: pytest.MonkeyPatch
) -> None:
    met, sizes = asyncio.Barrier(8), []
    work = _calls.work

    def noting(*args: Any, completions: Sequence[str] = (), **more: Any) -> Call[Round]:
        sizes.append(sum(map(len, completions)))
        return work(*args, completions=completions, **more)

    monkeypatch.setattr(_calls, "work", noting)

    async def large(command: Command, context: HandlerContext) -> str:
        await met.wait()
        return str(command.data) * (MAX_BYTES - 2)  # and the quotation marks

    sent = await bus.send_batch([SendRequest(DOMAIN, "Debit", str(n)) for n in range(8)])
    async with running(Worker(bus, DOMAIN, registry_of(Debit=large))):
        for n, command in enumerate(await all_settled(bus, sent)):
            assert (command.status, command.delivery) == (CommandStatus.COMPLETED, 1)
            assert command.result == str(n) * (MAX_BYTES - 2)
    assert MAX_BYTES <= max(sizes) < 2 * MAX_BYTES + 1000


async def test_a_result_too_large_is_replaced(bus: CommandBus) -> None:
    async def large(command: Command, context: HandlerContext) -> str:
        return "x" * (MAX_BYTES - 1)

    registry = transactional(Together=large)
    registry.handler(DOMAIN, "Alone")(large)
    async with running(Worker(bus, DOMAIN, registry)):
        sent = [await bus.send(DOMAIN, command_type, {}) for command_type in ("Alone", "Together")]
        for command in await all_settled(bus, sent):
            assert (command.status, command.attempts, command.delivery) == (CommandStatus.COMPLETED, 1, 1)
            assert command.result["reason"].startswith("result has 1,048,577 bytes")


# --------------------------------------------------------------------------------- sessions of transactions

STATE = """SELECT jsonb_build_object('path', current_setting('search_path'), 'zone', current_setting('TimeZone'),
    'user', current_user, 'session', session_user, 'isolation', current_setting('default_transaction_isolation'),
    'own', coalesce(current_setting('app.tenant', true), ''),
    'locks', (SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid()))"""
LEFT_BEHIND = [
    "SET search_path = pg_temp; SET TimeZone = 'Asia/Kolkata'",
    "SET ROLE pg_monitor",
    "SET SESSION AUTHORIZATION pg_monitor",
    "SET default_transaction_isolation = 'serializable'",
    "SET app.tenant = 'ana'",
    "SELECT pg_advisory_lock(7)",
]


@direct_only  # behind a pooler it is left in somebody's session
@pytest.mark.parametrize("statement", LEFT_BEHIND)
@pytest.mark.parametrize("ending", ["returns", "fails"])
async def test_a_handler_leaves_nothing_in_its_session(
    bus: CommandBus, db: Connection, statement: str, ending: str
) -> None:
    async def leave(command: Command, context: HandlerContext) -> None:
        assert context.connection is not None
        await context.connection.execute(statement.encode())
        if ending == "fails":
            raise BusinessRuleError("NO")

    async def look(command: Command, context: HandlerContext) -> Any:  # noqa: ANN401 - any JSON
        assert context.connection is not None
        ((state,),) = await (await context.connection.execute(STATE)).fetchall()
        return [context.connection.info.backend_pid, state]

    db.execute("GRANT USAGE ON SCHEMA commandbus TO pg_monitor")
    db.execute("GRANT EXECUTE ON ALL FUNCTIONS IN SCHEMA commandbus TO pg_monitor")
    worker = Worker(bus, DOMAIN, transactional(Leave=leave, Look=look), transactional_connections=1)
    async with running(worker):
        before = await settled(bus, await bus.send(DOMAIN, "Look", {}))
        left = await settled(bus, await bus.send(DOMAIN, "Leave", {}))
        after = await settled(bus, await bus.send(DOMAIN, "Look", {}))
    assert left.status == (CommandStatus.COMPLETED if ending == "returns" else CommandStatus.FAILED)
    assert before.result == after.result


@pytest.mark.parametrize("commits", [True, False])
async def test_what_a_handler_sends_in_its_transaction_shares_its_fate(bus: CommandBus, *, commits: bool) -> None:
    async def debit(command: Command, context: HandlerContext) -> None:
        await context.bus.send(DOMAIN, "Next", {}, connection=context.connection)
        await context.bus.send_batch([SendRequest(DOMAIN, "Next", {})] * 2, connection=context.connection)
        assert await context.bus.count(command_type="Next") == 0  # nobody sees them yet
        if not commits:
            raise BusinessRuleError("NO")

    async with running(Worker(bus, DOMAIN, transactional(Debit=debit))):
        await settled(bus, await bus.send(DOMAIN, "Debit", {}))
    assert await bus.count(command_type="Next") == (3 if commits else 0)


# ---------------------------------------------------------------------------------------------------- logs


async def test_a_failed_attempt_is_one_record_that_says_what_follows(
    bus: CommandBus, caplog: pytest.LogCaptureFixture
) -> None:
    async def fail(command: Command, context: HandlerContext) -> None:
        raise {"Later": ValueError, "Park": PermanentCommandError, "End": BusinessRuleError}[command.command_type](
            "CODE", "secret words"
        )

    registry = HandlerRegistry()
    for command_type in ("Later", "Park", "End"):
        registry.handler(DOMAIN, command_type, retry=RetryPolicy(2, [timedelta(0)], jitter=0))(fail)
    with caplog.at_level(logging.DEBUG, "commandbus"):
        worker = Worker(bus, DOMAIN, registry)
        async with running(worker):
            sent = [await bus.send(DOMAIN, name, {"a": "secret payload"}) for name in ("Later", "Park", "End")]
            commands = await all_settled(bus, sent)
    expected = {
        ("Later", 1): ("WARNING", "attempt 1 failed with ValueError: again in 0.0 s"),
        ("Later", 2): ("ERROR", "attempt 2 failed with ValueError: it is parked in the troubleshooting queue"),
        ("Park", 1): ("ERROR", "attempt 1 failed with CODE: it is parked in the troubleshooting queue"),
        ("End", 1): ("INFO", "attempt 1 failed with CODE: it ends as FAILED"),
    }
    told = [record.__dict__ for record in caplog.records if "failed with" in record.getMessage()]
    found = {(r["command_type"], r["attempt"]): (r["levelname"], r["msg"] % r["args"]) for r in told}
    assert (len(told), found) == (4, expected)
    ids = {command.command_type: str(command.command_id) for command in commands}
    for record in told:
        assert (record["name"], record["domain"], record["worker"]) == ("commandbus.worker", DOMAIN, worker.name)
        assert (record["command_id"], record["delivery"]) == (ids[record["command_type"]], record["attempt"])
    assert "secret" not in caplog.text
