"""How the blocking worker starts and stops, from wherever it is asked to, and what it says of that."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from datetime import timedelta

import pytest

from commandbus import Command, CommandStatus, HandlerContext, StopReport
from commandbus.errors import ClosedError, ConfigurationError, DatabaseUnavailableError
from commandbus.sync import SyncCommandBus, SyncHandlerContext, SyncRuntime, SyncWorker
from tests.bus.support import DOMAIN, Connection, one
from tests.support import eventually
from tests.sync.support_worker import (
    HOUR,
    Waiting,
    echo,
    registry_of,
    result_of,
    run_in_thread,
    settled,
    story,
    working,
)

CLEAN = StopReport(0, 0, ())


@pytest.fixture
def waiting() -> Iterator[Waiting]:
    """A handler that waits; let go at the end in any case."""
    found = Waiting()
    yield found
    found.go_on.set()


# ---------------------------------------------------------------------------------------- run and stop


def test_run_blocks_until_another_thread_stops_it(bus: SyncCommandBus) -> None:
    worker = SyncWorker(bus, DOMAIN, registry_of(Debit=echo))
    run = run_in_thread(worker.run)
    assert settled(bus, bus.send(DOMAIN, "Debit", 1)).result == 1
    assert run[0].is_alive()
    assert worker.stop() == CLEAN
    assert result_of(run) == CLEAN


def test_it_works_in_the_background_between_start_and_stop(bus: SyncCommandBus) -> None:
    worker = SyncWorker(bus, DOMAIN, registry_of(Debit=echo))
    worker.start()
    command = settled(bus, bus.send(DOMAIN, "Debit", 1))
    assert (command.result, command.worker) == (1, worker.name)
    assert worker.stop() == CLEAN
    assert worker.stop() == CLEAN  # there is nothing left to stop
    assert bus.get_command(bus.send(DOMAIN, "Debit", 2)).status == CommandStatus.PENDING


@pytest.mark.parametrize("begin", [SyncWorker.run, SyncWorker.start, SyncWorker.__enter__])
def test_a_worker_runs_once(bus: SyncCommandBus, begin: object) -> None:
    assert callable(begin)
    with working(bus, registry_of(Debit=echo)) as worker:
        with pytest.raises(ConfigurationError, match="has run: make a new one"):
            begin(worker)
        assert settled(bus, bus.send(DOMAIN, "Debit", 1)).result == 1  # the first goes on
    with pytest.raises(ConfigurationError, match="has run: make a new one"):
        begin(worker)


def test_stopped_before_the_start_it_takes_nothing(bus: SyncCommandBus) -> None:
    receipt = bus.send(DOMAIN, "Debit", 1)
    worker = SyncWorker(bus, DOMAIN, registry_of(Debit=echo))
    assert worker.stop() is None
    assert worker.run() == CLEAN
    assert bus.get_command(receipt).delivery == 0


def test_a_start_that_fails_can_be_repeated(bus: SyncCommandBus, dsn: str, runtime: SyncRuntime) -> None:
    nowhere = SyncCommandBus("host=127.0.0.1 port=1 dbname=none", runtime=runtime)
    worker = SyncWorker(nowhere, DOMAIN, registry_of(Debit=echo))
    for _ in range(2):
        with pytest.raises(DatabaseUnavailableError):
            worker.start()
    assert worker.stop() is None


def test_a_closed_bus_is_refused_at_the_start(bus: SyncCommandBus) -> None:
    bus.open()
    bus.close()
    with pytest.raises(ClosedError):
        SyncWorker(bus, DOMAIN, registry_of(Debit=echo)).start()


def test_the_shutdown_of_the_runtime_ends_run_with_its_report(bus: SyncCommandBus, runtime: SyncRuntime) -> None:
    run = run_in_thread(SyncWorker(bus, DOMAIN, registry_of(Debit=echo)).run)
    assert settled(bus, bus.send(DOMAIN, "Debit", 1)).result == 1
    runtime.shutdown()
    assert result_of(run) == CLEAN


# ------------------------------------------------------------------------------------- what is reported


def test_what_runs_may_finish_and_is_reported(bus: SyncCommandBus, waiting: Waiting) -> None:
    registry = registry_of(Debit=waiting.handler, Quick=echo)
    with working(bus, registry, thread_pool_size=2, concurrency=2, grace=HOUR) as worker:  # nothing waits for a thread
        settled(bus, bus.send(DOMAIN, "Quick", 1))  # finished before the stop: not in the report
        sent = [bus.send(DOMAIN, "Debit", n) for n in range(3)]
        waiting.started(2)
        stopping = run_in_thread(worker.stop)
        assert stopping[0].is_alive()
        waiting.go_on.set()
        assert result_of(stopping) == StopReport(finished=2, released=0, stuck=())
    statuses = sorted(bus.get_command(receipt).status for receipt in sent)
    assert statuses == ["COMPLETED", "COMPLETED", "PENDING"]


def test_who_outlives_the_grace_is_released_and_named_with_its_stack(bus: SyncCommandBus, waiting: Waiting) -> None:
    with working(bus, registry_of(Debit=waiting.handler), grace=HOUR) as worker:
        receipt = bus.send(DOMAIN, "Debit", {"secret": "do not tell"})
        waiting.started()
        report = worker.stop(timedelta(0))
        assert report is not None
        assert (report.finished, report.released) == (0, 1)
        (stuck,) = report.stuck
        assert (stuck.domain, stuck.command_id, stuck.command_type) == (DOMAIN, receipt.command_id, "Debit")
        assert "self.go_on.wait(60)" in stuck.stack
        assert "do not tell" not in repr(report)
    assert bus.get_command(receipt).status == CommandStatus.PENDING


def test_what_a_stuck_handler_does_at_last_changes_nothing(bus: SyncCommandBus, waiting: Waiting) -> None:
    threads: list[threading.Thread] = []

    def stuck(command: Command, context: SyncHandlerContext) -> str:
        threads.append(threading.current_thread())
        return waiting.handler(command, context)

    with working(bus, registry_of(Debit=stuck), grace=timedelta(0)):
        receipt = bus.send(DOMAIN, "Debit", 1)
        waiting.started()
    assert waiting.contexts[0].cancelled
    released = bus.get_audit_trail(receipt)
    with working(bus, registry_of(Debit=echo)):
        assert settled(bus, receipt).result == 1
    trail = bus.get_audit_trail(receipt)
    waiting.go_on.set()
    threads[0].join(30)
    assert story(bus, receipt) == ["SENT", "CLAIMED", "RELEASED", "CLAIMED", "COMPLETED"]
    assert bus.get_audit_trail(receipt) == trail
    assert trail[: len(released)] == released
    assert bus.get_command(receipt).attempts == 1  # the stuck one was not charged


def test_what_was_claimed_while_it_stopped_is_reported_as_released(bus: SyncCommandBus, db: Connection) -> None:
    db.execute("CREATE TABLE gate AS SELECT 1")
    db.execute(
        "CREATE FUNCTION wait_at_gate() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
        "WHILE EXISTS (SELECT FROM public.gate) LOOP PERFORM pg_sleep(0.005); END LOOP; RETURN NEW; END $$"
    )
    db.execute(
        "CREATE TRIGGER gate BEFORE UPDATE ON commandbus.command FOR EACH ROW EXECUTE FUNCTION public.wait_at_gate()"
    )
    receipt = bus.send(DOMAIN, "Debit", 1)
    with working(bus, registry_of(Debit=echo)) as worker:
        claiming = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'PgSleep' AND query LIKE '%%work_v1%%'"
        eventually(lambda: one(db, claiming), what="the claim at the gate")
        stopping = run_in_thread(worker.stop)
        eventually(lambda: worker._worker._stops, what="the stop")
        db.execute("DELETE FROM gate")
        assert result_of(stopping) == StopReport(finished=0, released=1, stuck=())
    assert story(bus, receipt) == ["SENT", "CLAIMED", "RELEASED"]


def test_a_second_stop_ends_the_grace(bus: SyncCommandBus, waiting: Waiting) -> None:
    with working(bus, registry_of(Debit=waiting.handler), grace=HOUR) as worker:
        bus.send(DOMAIN, "Debit", 1)
        waiting.started()
        patient = run_in_thread(worker.stop)
        eventually(lambda: worker._worker._stops, what="the first stop")
        report = worker.stop()
        assert report is not None
        assert (report.released, len(report.stuck)) == (1, 1)
        assert result_of(patient) == report


def test_a_long_handler_can_see_that_it_should_stop(bus: SyncCommandBus) -> None:
    begun = threading.Event()
    ends: list[str] = []

    def polite(command: Command, context: SyncHandlerContext) -> None:
        begun.set()
        try:
            while True:
                context.raise_if_cancelled()
        finally:
            ends.append(f"cancelled: {context.cancelled}")

    with working(bus, registry_of(Debit=polite), grace=timedelta(0)):
        receipt = bus.send(DOMAIN, "Debit", 1)
        assert begun.wait(30)
    eventually(lambda: ends, what="the end of the handler")
    assert ends == ["cancelled: True"]
    assert story(bus, receipt) == ["SENT", "CLAIMED", "RELEASED"]


# --------------------------------------------------------------------------------- from its own handler


def test_a_def_handler_may_stop_its_worker(bus: SyncCommandBus) -> None:
    answers: list[object] = []

    def last(command: Command, context: SyncHandlerContext) -> str:
        answers.append(worker.stop())
        return "the last"

    worker = SyncWorker(bus, DOMAIN, registry_of(Last=last))
    receipt = bus.send(DOMAIN, "Last", 1)
    assert worker.run() == StopReport(finished=1, released=0, stuck=())
    assert answers == [None]
    assert bus.get_command(receipt).result == "the last"


def test_an_async_handler_may_stop_its_worker(bus: SyncCommandBus) -> None:
    answers: list[object] = []

    async def last(command: Command, context: HandlerContext) -> str:
        answers.append(worker.stop())
        return "the last"

    worker = SyncWorker(bus, DOMAIN, registry_of(Last=last))
    receipt = bus.send(DOMAIN, "Last", 1)
    assert worker.run() == StopReport(finished=1, released=0, stuck=())
    assert answers == [None]
    assert bus.get_command(receipt).result == "the last"


def test_a_handler_may_stop_the_other_worker_and_wait_for_it(bus: SyncCommandBus) -> None:
    other = SyncWorker(bus, DOMAIN, registry_of(Other=echo))

    def stop_other(command: Command, context: SyncHandlerContext) -> bool:
        return other.stop() == CLEAN

    other.start()
    with working(bus, registry_of(Debit=stop_other)):
        assert settled(bus, bus.send(DOMAIN, "Debit", 1)).result is True


# ---------------------------------------------------------------------------------------------- signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_run_in_the_main_thread(bus: SyncCommandBus, number: signal.Signals) -> None:
    before = signal.getsignal(number)

    def kill(command: Command, context: SyncHandlerContext) -> str:
        os.kill(os.getpid(), number)
        return "done"

    receipt = bus.send(DOMAIN, "Kill", 1)
    report = SyncWorker(bus, DOMAIN, registry_of(Kill=kill)).run()
    assert (report.released, report.stuck) == (0, ())
    assert bus.get_command(receipt).result == "done"
    assert signal.getsignal(number) is before


def test_a_signal_that_does_not_interrupt_the_main_thread_ends_run_as_well(bus: SyncCommandBus) -> None:
    def kill(command: Command, context: SyncHandlerContext) -> None:
        signal.pthread_kill(threading.get_ident(), signal.SIGTERM)  # this thread gets it; Python tells the main one

    bus.send(DOMAIN, "Kill", 1)
    assert SyncWorker(bus, DOMAIN, registry_of(Kill=kill)).run().released == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_in_another_thread_it_neither_takes_nor_hides_a_signal(bus: SyncCommandBus, number: signal.Signals) -> None:
    seen: list[int] = []
    before = signal.signal(number, lambda number, _: seen.append(number))
    try:
        worker = SyncWorker(bus, DOMAIN, registry_of(Debit=echo))
        run = run_in_thread(worker.run)
        settled(bus, bus.send(DOMAIN, "Debit", 1))
        os.kill(os.getpid(), number)
        assert seen == [number]
        assert settled(bus, bus.send(DOMAIN, "Debit", 2)).result == 2  # it goes on
        worker.stop()
        assert result_of(run) == CLEAN
    finally:
        signal.signal(number, before)


# ------------------------------------------------------------------------- several, and another process


def test_workers_and_buses_share_one_runtime(bus: SyncCommandBus, dsn: str, runtime: SyncRuntime) -> None:
    second = SyncCommandBus(dsn, runtime=runtime)
    before = set(threading.enumerate())  # another test's application may keep the runtime of the process
    domains = ["payments", "shipping", "billing"]
    workers = [
        SyncWorker(worker_bus, domain, registry_of(domain, Debit=echo), thread_pool_size=2)
        for worker_bus, domain in zip([bus, second, second], domains, strict=True)
    ]
    for worker in workers:
        worker.start()
    receipts = [bus.send(domain, "Debit", n) for n in range(5) for domain in domains]
    commands = [settled(bus, receipt) for receipt in receipts]
    assert {command.worker for command in commands} == {worker.name for worker in workers}
    assert all(command.delivery == 1 for command in commands)
    assert [thread.name for thread in set(threading.enumerate()) - before].count("commandbus-sync") == 1
    assert workers[0].stop() == CLEAN
    assert settled(bus, bus.send("shipping", "Debit", 7)).result == 7  # the others go on
    assert [worker.stop() for worker in workers[1:]] == [CLEAN, CLEAN]


def test_two_workers_of_one_domain_share_its_commands(bus: SyncCommandBus) -> None:
    waiting = Waiting()
    with (
        working(bus, registry_of(Debit=waiting.handler), thread_pool_size=1),
        working(bus, registry_of(Debit=waiting.handler), thread_pool_size=1),
    ):
        sent = [bus.send(DOMAIN, "Debit", n) for n in range(2)]
        waiting.started(2)
        waiting.go_on.set()
        assert len({settled(bus, receipt).worker for receipt in sent}) == 2
