"""How a worker ends: what runs may finish, what does not is given back, and nothing keeps it."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest

from commandbus import (
    Command,
    CommandBus,
    CommandStatus,
    HandlerContext,
    HandlerRegistry,
    Receipt,
    SendRequest,
    Worker,
)
from commandbus.worker import worker as worker_module
from commandbus.worker.housekeeper import Housekeeper
from tests.bus.support import DOMAIN, Connection, expire, lease, until
from tests.support import Route, async_only
from tests.worker.support import (
    HOUR,
    Watched,
    process,
    registry_of,
    running,
    settled,
    story,
)


@pytest.fixture
def go_on() -> Iterator[threading.Event]:
    """Lets handlers in threads go on; at the end of the test in any case."""
    event = threading.Event()
    yield event
    event.set()


async def uncharged(bus: CommandBus, receipt: Receipt) -> None:
    """Given back, as if its handler had never started."""
    command = await bus.get_command(receipt)
    assert (command.status, command.attempts, command.crashes) == (CommandStatus.PENDING, 0, 0)
    assert await story(bus, receipt) == ["SENT", "CLAIMED", "RELEASED"]


async def test_what_runs_finishes_and_nothing_more_is_taken(bus: CommandBus) -> None:
    watched = Watched()
    sent = await bus.send_batch([SendRequest(DOMAIN, "Debit", n) for n in range(5)])
    worker = Worker(bus, DOMAIN, registry_of(Debit=watched.handler), concurrency=2, grace=HOUR)
    task = asyncio.create_task(worker.run())
    await watched.started(2)
    await asyncio.to_thread(worker.stop)
    await asyncio.sleep(0.1)  # time enough for a worker that does not care
    assert not task.done()
    watched.go_on.set()
    await asyncio.wait_for(task, 20)
    commands = [await bus.get_command(receipt) for receipt in sent]
    assert sorted(command.status for command in commands) == ["COMPLETED"] * 2 + ["PENDING"] * 3
    assert sorted(command.delivery for command in commands) == [0, 0, 0, 1, 1]


async def test_a_second_stop_hurries(bus: CommandBus) -> None:
    watched = Watched()
    worker = Worker(bus, DOMAIN, registry_of(Debit=watched.handler), grace=HOUR)
    task = asyncio.create_task(worker.run())
    sent = await bus.send_batch([SendRequest(DOMAIN, "Debit", n) for n in range(5)])
    await watched.started(5)
    worker.stop()
    worker.stop()
    await asyncio.wait_for(task, 20)
    assert watched.cancelled == 5
    assert all(context.cancelled for context in watched.contexts)
    for receipt in sent:
        await uncharged(bus, receipt)


async def test_the_grace_is_bounded(bus: CommandBus, go_on: threading.Event) -> None:
    watched = Watched()
    contexts: list[HandlerContext] = []
    threads: list[threading.Thread] = []

    def blocking(command: Command, context: HandlerContext) -> str:
        contexts.append(context)
        threads.append(threading.current_thread())
        go_on.wait(60)
        return "too late"

    registry = registry_of(Async=watched.handler, Def=blocking)
    worker = Worker(bus, DOMAIN, registry, grace=timedelta(milliseconds=50))
    task = asyncio.create_task(worker.run())
    sent = [await bus.send(DOMAIN, command_type, {}) for command_type in ("Async", "Def")]
    await watched.started()
    await until(lambda: contexts, "the def handler")
    worker.stop()
    await asyncio.wait_for(task, 20)
    assert watched.cancelled == 1
    assert contexts[0].cancelled
    go_on.set()
    await until(lambda: not threads[0].is_alive(), "the end of the thread")
    await asyncio.sleep(0)
    for receipt in sent:
        await uncharged(bus, receipt)


@async_only("cancels a task")
async def test_a_cancelled_run_gives_back_what_it_holds(bus: CommandBus) -> None:
    watched = Watched()
    # With one slot, which is taken: a call that claims, cut off, might claim the command again once it is given back.
    task = asyncio.create_task(Worker(bus, DOMAIN, registry_of(Debit=watched.handler), concurrency=1).run())
    receipt = await bus.send(DOMAIN, "Debit", {})
    await watched.started()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(task, 20)
    await uncharged(bus, receipt)


async def test_a_worker_stopped_before_it_runs_takes_nothing(bus: CommandBus) -> None:
    receipt = await bus.send(DOMAIN, "Debit", {})
    worker = Worker(bus, DOMAIN, registry_of(Debit=Watched().handler))
    worker.stop()
    await asyncio.wait_for(worker.run(), 20)
    assert (await bus.get_command(receipt)).delivery == 0


async def test_a_worker_stopped_while_it_starts_ends_quietly(bus: CommandBus) -> None:
    async def transactional(command: Command, context: HandlerContext) -> None:
        return None

    registry = HandlerRegistry()
    registry.handler(DOMAIN, "Debit", transactional=True)(transactional)
    worker = Worker(bus, DOMAIN, registry)
    task = asyncio.create_task(worker.run())
    for _ in range(3):  # it opens its connections now
        await asyncio.sleep(0)
    worker.stop()
    await asyncio.wait_for(task, 20)


async def test_stopping_a_worker_that_has_stopped_is_nothing(bus: CommandBus) -> None:
    worker = Worker(bus, DOMAIN, registry_of(Debit=Watched().handler))
    async with running(worker):
        pass
    worker.stop()


def crash_twice(db: Connection, receipt: Receipt) -> None:
    """Bring the one pending command of this type to where it runs alone, at once."""
    for _ in range(2):
        lease(db, "Lonely")
        expire(db, receipt.command_id)
    db.execute("UPDATE commandbus.command SET alone_since = alone_since - interval '2 s' WHERE crashes = 2")


@pytest.mark.parametrize("moment", ["while it runs alone", "while the others drain"])
async def test_a_lonely_command_does_not_keep_a_worker_from_stopping(
    bus: CommandBus, db: Connection, moment: str
) -> None:
    watched, lonely = Watched(), Watched()
    receipt = await bus.send(DOMAIN, "Lonely", {})
    crash_twice(db, receipt)
    worker = Worker(bus, DOMAIN, registry_of(Debit=watched.handler, Lonely=lonely.handler), grace=timedelta(0))
    if moment == "while the others drain":
        db.execute("UPDATE commandbus.command SET alone_since = alone_since + interval '1 h'")
    task = asyncio.create_task(worker.run())
    if moment == "while the others drain":
        beside = await bus.send(DOMAIN, "Debit", {})
        await watched.started()
        db.execute("UPDATE commandbus.command SET alone_since = alone_since - interval '1 h' WHERE crashes = 2")
        waits = await bus.send(DOMAIN, "Debit", {})
        await asyncio.sleep(1.5)  # it sees the lonely one, and waits for the others to end
        worker.stop()
        await asyncio.wait_for(task, 20)
        await uncharged(bus, beside)
        assert (await bus.get_command(waits)).attempts == 0
    else:
        await lonely.started()
        worker.stop()
        await asyncio.wait_for(task, 20)
        assert lonely.cancelled == 1
    command = await bus.get_command(receipt)
    assert (command.status, command.crashes, command.attempts) == (CommandStatus.PENDING, 2, 0)


async def test_sigterm_lets_a_process_finish_what_runs(bus: CommandBus, route: Route, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    with process("worker_app.py", route, "60", "1") as found:
        sent = [await bus.send(DOMAIN, "UntilFile", str(gate)) for _ in range(2)]
        await until(Path(f"{gate}.begun").exists, "the handler's start")
        found.popen.send_signal(signal.SIGTERM)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.to_thread(found.popen.wait, 60), 0.3)
        gate.touch()
        assert await until(lambda: found.popen.poll() is not None, "the end of the process")
        assert found.popen.returncode == 0
    assert (await settled(bus, sent[0])).delivery == 1
    second = await bus.get_command(sent[1])
    assert (second.status, second.delivery) == (CommandStatus.PENDING, 0)


async def test_a_part_that_misses_its_cancellation_does_not_keep_a_worker(
    bus: CommandBus, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = asyncio.Event()

    async def deaf_once(_: object) -> None:
        try:
            await asyncio.sleep(0)
            begun.set()
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            await asyncio.Event().wait()

    monkeypatch.setattr(Housekeeper, "run", deaf_once)
    monkeypatch.setattr(worker_module, "_HELPER_SECONDS", 0.05)
    async with running(Worker(bus, DOMAIN, registry_of(Debit=Watched().handler))):
        await begun.wait()
