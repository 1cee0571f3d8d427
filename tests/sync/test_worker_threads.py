"""How many threads the blocking worker has, what it leases for them, and what a handler finds in its own."""

from __future__ import annotations

import asyncio
import logging
import os
import random
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from commandbus import Command, CommandBus, CommandStatus, HandlerContext, SendRequest
from commandbus.errors import ConfigurationError
from commandbus.sync import SyncCommandBus, SyncHandlerContext, SyncRuntime, SyncWorker, configure, defaults
from tests.bus.support import DOMAIN, Connection, one, rows
from tests.support import eventually
from tests.sync.support_worker import PARKED, Waiting, all_settled, echo, registry_of, settled, working

who: ContextVar[str] = ContextVar("who", default="nobody")


@pytest.fixture(autouse=True)
def _defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `configure` is told here is forgotten after the test."""
    monkeypatch.setattr(defaults, "_sizes", {})


@pytest.fixture
def waiting() -> Iterator[Waiting]:
    """A handler that waits; let go at the end in any case."""
    found = Waiting()
    yield found
    found.go_on.set()


# ------------------------------------------------------------------------------------------ how many


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ((2, 3, "4"), 2),
        ((None, 3, "4"), 3),
        ((None, None, " 4 "), 4),
        ((None, None, None), min(32, os.cpu_count() or 1)),
    ],
    ids=["the parameter", "configure", "the environment", "the default"],
)
def test_the_first_that_says_a_size_wins_and_it_is_logged(
    bus: SyncCommandBus,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    sizes: tuple[int | None, int | None, str | None],
    expected: int,
) -> None:
    parameter, configured, environment = sizes
    if environment is not None:
        monkeypatch.setenv("COMMAND_BUS_SYNC_THREADS", environment)
    configure(thread_pool_size=configured)
    with caplog.at_level(logging.INFO, "commandbus.worker"):
        worker = SyncWorker(bus, DOMAIN, registry_of(Debit=echo), thread_pool_size=parameter)
        worker.stop()
        worker.run()
    (line,) = [line for line in caplog.messages if "starts" in line]
    assert line.endswith(f"threads {expected}")


def test_so_many_handlers_run_at_once(bus: SyncCommandBus, waiting: Waiting) -> None:
    sent = [bus.send(DOMAIN, "Debit", n) for n in range(4)]
    with working(bus, registry_of(Debit=waiting.handler), thread_pool_size=3):
        waiting.started(3)
        assert bus.count(status=CommandStatus.IN_PROGRESS) == 3
        waiting.go_on.set()
        all_settled(bus, sent)


@pytest.mark.parametrize("size", [0, -1])
def test_a_size_below_1_is_an_error_that_names_it(bus: SyncCommandBus, size: int) -> None:
    with pytest.raises(ConfigurationError, match=f"thread_pool_size is {size}: it must be at least 1"):
        SyncWorker(bus, DOMAIN, registry_of(Debit=echo), thread_pool_size=size)
    with pytest.raises(ConfigurationError, match=f"thread_pool_size is {size}: it must be at least 1"):
        configure(thread_pool_size=size)


@pytest.mark.parametrize("text", ["0", "-1", "many", "", "2.5"])
def test_a_wrong_variable_is_an_error_that_names_it(
    bus: SyncCommandBus, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setenv("COMMAND_BUS_SYNC_THREADS", text)
    with pytest.raises(ConfigurationError, match=f"COMMAND_BUS_SYNC_THREADS is '{text}'"):
        SyncWorker(bus, DOMAIN, registry_of(Debit=echo))
    SyncWorker(bus, DOMAIN, registry_of(Debit=echo), thread_pool_size=1)  # it is not asked


# ------------------------------------------------------------------------------------------ what is leased


@settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(threads=st.integers(1, 4), slowest=st.sampled_from([0.0, 0.002, 0.02]), seed=st.integers())
def test_no_more_is_leased_than_threads_are_free(
    bus: SyncCommandBus, db: Connection, threads: int, slowest: float, seed: int
) -> None:
    """At any time: what was claimed, less what a handler has returned from, is at most the number of threads.

    So it is when that is the concurrency: see `test_look_ahead.py`.
    """
    chance = random.Random(seed)
    pauses = [chance.uniform(0, slowest) for _ in range(120)]
    before = one(db, "SELECT coalesce(sum(delivery), 0) FROM commandbus.commands")
    returned: list[int] = []

    def work(command: Command, context: SyncHandlerContext) -> None:
        time.sleep(pauses[command.data])
        returned.append(command.data)

    sent = bus.send_batch([SendRequest(DOMAIN, "Work", n) for n in range(len(pauses))])
    most = 0
    with working(bus, registry_of(Work=work), thread_pool_size=threads, concurrency=threads):
        while len(returned) < len(pauses):
            claimed = one(db, "SELECT coalesce(sum(delivery), 0) FROM commandbus.commands") - before
            most = max(most, claimed - len(returned))
        commands = all_settled(bus, sent)
    assert most <= threads
    assert {(command.status, command.delivery, command.crashes) for command in commands} == {
        (CommandStatus.COMPLETED, 1, 0)
    }


def test_a_thread_that_goes_on_after_its_timeout_keeps_its_slot(bus: SyncCommandBus, waiting: Waiting) -> None:
    async def quick(command: Command, context: HandlerContext) -> None:
        return None

    registry = registry_of(timeout=timedelta(milliseconds=50), Slow=waiting.handler, Quick=quick, Next=echo)
    with working(bus, registry, thread_pool_size=1):
        late = settled(bus, bus.send(DOMAIN, "Slow", 1, max_attempts=1))
        assert (late.status, late.error and late.error.code) == (PARKED, "TIMEOUT")
        waits = bus.send(DOMAIN, "Next", 2)
        for n in range(10):  # the claimer goes round and round meanwhile
            settled(bus, bus.send(DOMAIN, "Quick", n))
        assert bus.get_command(waits).delivery == 0
        waiting.go_on.set()
        assert settled(bus, waits).result == 2


# ---------------------------------------------------------------------------------------- in a handler


def test_def_and_async_handlers_work_side_by_side(bus: SyncCommandBus, runtime: SyncRuntime) -> None:
    def blocking(command: Command, context: SyncHandlerContext) -> str:
        with pytest.raises(RuntimeError):
            asyncio.get_running_loop()
        return type(context).__name__

    async def on_the_loop(command: Command, context: HandlerContext) -> str:
        assert asyncio.get_running_loop() is runtime.start()
        assert isinstance(context.bus, CommandBus)
        await context.bus.send(DOMAIN, "Next", command.data)
        return type(context).__name__

    with working(bus, registry_of(Def=blocking, Async=on_the_loop)):
        commands = all_settled(bus, [bus.send(DOMAIN, command_type, {}) for command_type in ("Def", "Async")])
    assert [command.result for command in commands] == ["SyncHandlerContext", "HandlerContext"]
    assert bus.count(command_type="Next") == 1


def test_a_def_handler_sees_its_command_and_sends_what_comes_next(bus: SyncCommandBus) -> None:
    seen: list[SyncHandlerContext] = []

    def look(command: Command, context: SyncHandlerContext) -> str:
        assert context.command is command
        context.raise_if_cancelled()
        seen.append(context)
        return str(context.bus.send(DOMAIN, "Next", command.data).command_id)

    with working(bus, registry_of(Debit=look)) as worker:
        command = settled(bus, bus.send(DOMAIN, "Debit", {"a": 1}, headers={"h": "v"}))
    (context,) = seen
    assert context.bus is bus
    assert (context.delivery, context.attempt, context.headers, context.connection) == (1, 1, {"h": "v"}, None)
    assert (context.command.status, context.command.worker) == (CommandStatus.IN_PROGRESS, worker.name)
    (sent,) = bus.query_commands(command_type="Next").items
    assert (str(sent.command_id), sent.data) == (command.result, {"a": 1})


def test_all_threads_may_send_at_once_through_the_workers_runtime(bus: SyncCommandBus, db: Connection) -> None:
    def fan_out(command: Command, context: SyncHandlerContext) -> None:
        for n in range(25):
            context.bus.send(DOMAIN, "Leaf", n)

    sent = bus.send_batch([SendRequest(DOMAIN, "Fan", n) for n in range(16)])
    with working(bus, registry_of(Fan=fan_out), thread_pool_size=8):
        all_settled(bus, sent)
    assert rows(db, "SELECT count(*) FROM commandbus.commands WHERE command_type = 'Leaf'") == [(400,)]


class Named:
    """Lets the handler run under the value that stands in the headers."""

    def inject(self, headers: dict[str, str]) -> None:
        headers["who"] = who.get()

    def activate(self, headers: Mapping[str, str]) -> AbstractContextManager[object]:
        @contextmanager
        def active() -> Iterator[None]:
            token = who.set(f"for {headers['who']}")
            try:
                yield
            finally:
                who.reset(token)

        return active()


def test_each_handler_runs_under_the_context_of_its_sender(dsn: str, runtime: SyncRuntime) -> None:
    bus = SyncCommandBus(dsn, runtime=runtime, tracing=Named())
    results: dict[str, Any] = {}

    def in_a_thread(command: Command, context: SyncHandlerContext) -> str:
        context.bus.send(DOMAIN, "Next", {})
        who.set(who.get() + ", in a thread")  # stays in this handler's own copy
        return who.get()

    def sender(name: str) -> None:
        who.set(name)
        results[name] = settled(bus, bus.send(DOMAIN, "Debit", {})).result

    with working(bus, registry_of(Debit=in_a_thread), thread_pool_size=2):
        threads = [threading.Thread(target=sender, args=[f"sender {n}"]) for n in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
    assert results == {f"sender {n}": f"for sender {n}, in a thread" for n in range(16)}
    sent = bus.query_commands(command_type="Next").items
    assert {command.headers["who"] for command in sent} == {f"for sender {n}" for n in range(16)}


def test_idle_threads_end_with_the_worker(bus: SyncCommandBus) -> None:
    with working(bus, registry_of(Debit=echo), thread_pool_size=2) as worker:
        all_settled(bus, [bus.send(DOMAIN, "Debit", n) for n in range(4)])
        assert any(thread.name.startswith(worker.name) for thread in threading.enumerate())
    eventually(
        lambda: not any(thread.name.startswith(worker.name) for thread in threading.enumerate()),
        what="the end of its threads",
    )
