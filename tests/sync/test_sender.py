"""Sends that threads carry themselves, on a connection that the send buffer lends; and every way in which that ends."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import FrameType
from typing import Any
from uuid import uuid4

import psycopg
import pytest

from commandbus import (
    ClosedError,
    CommandIdConflictError,
    InvalidCommandError,
    OutcomeUnknownError,
    Receipt,
    SendRequest,
    SendTimeoutError,
)
from commandbus import _database as database
from commandbus import _send_buffer as send_buffer
from commandbus.sync import SyncCommandBus, SyncRuntime, sender
from tests.bus.support import DOMAIN, Gate, one
from tests.support import eventually
from tests.sync.support_runtime import in_thread, on_loop
from tests.sync.test_threads import in_threads


@pytest.fixture
def gate(db: psycopg.Connection) -> Iterator[Gate]:
    gate = Gate(db)
    yield gate
    gate.open()


@pytest.fixture
def bus(runtime: SyncRuntime, dsn: str) -> SyncCommandBus:
    """A bus whose threads have a connection already."""
    return lent(SyncCommandBus(dsn, runtime=runtime))


def lent(bus: SyncCommandBus) -> SyncCommandBus:
    """Send through the loop, after which it lends a connection."""

    def sent_and_lent() -> bool:
        bus.send(DOMAIN, "First", 0)
        return bus._sender._loan is not None

    eventually(sent_and_lent)
    return bus


@contextmanager
def loop_stopped(runtime: SyncRuntime) -> Iterator[None]:
    """Have the loop do nothing meanwhile."""
    stopped, go_on = threading.Event(), threading.Event()

    def stop() -> None:
        stopped.set()
        go_on.wait(20)

    on_loop(runtime, stop)
    assert stopped.wait(20)
    try:
        yield
    finally:
        go_on.set()


def of_type(db: psycopg.Connection, command_type: str) -> int:
    return int(one(db, "SELECT count(*) FROM commandbus.commands WHERE command_type = %s", command_type))


def lent_session(bus: SyncCommandBus) -> int:
    loan = bus._sender._loan
    assert loan is not None
    return loan.connection.info.backend_pid


def test_sends_of_threads_do_not_need_the_loop(bus: SyncCommandBus, db: psycopg.Connection) -> None:
    with loop_stopped(bus.runtime):
        receipts = in_threads(16, lambda n: [bus.send(DOMAIN, "Debit", n).command_id for _ in range(50)])
    assert of_type(db, "Debit") == len({command_id for thread in receipts for command_id in thread}) == 800


@pytest.mark.parametrize("options", [{"transaction_pooler": True}, {"flush_connections": 1}])
def test_so_behind_a_pooler_and_on_an_only_connection(
    runtime: SyncRuntime, dsn: str, db: psycopg.Connection, options: dict[str, Any]
) -> None:
    bus = lent(SyncCommandBus(dsn, runtime=runtime, **options))
    with loop_stopped(runtime):
        in_threads(4, lambda n: [bus.send(DOMAIN, "Debit", n) for _ in range(10)])
    assert of_type(db, "Debit") == 40


def test_an_only_connection_serves_threads_and_loop(runtime: SyncRuntime, dsn: str, db: psycopg.Connection) -> None:
    bus = lent(SyncCommandBus(dsn, runtime=runtime, flush_connections=1))

    def send(n: int) -> None:
        for _ in range(20):
            if n % 2:
                bus.send(DOMAIN, "Debit", n)
            else:
                bus.send_batch([SendRequest(DOMAIN, "Debit", n)] * 3)

    in_threads(8, send)
    assert of_type(db, "Debit") == 4 * 20 + 4 * 20 * 3
    bus.close()
    sessions = (
        "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'commandbus' AND datname = current_database()"
    )
    eventually(lambda: one(db, sessions) == 0)


def test_an_own_id_is_idempotent(bus: SyncCommandBus) -> None:
    own = uuid4()
    with loop_stopped(bus.runtime):
        first, second = (bus.send(DOMAIN, "Debit", 1, command_id=own) for _ in range(2))
        assert (first, second) == (Receipt(DOMAIN, own), Receipt(DOMAIN, own, duplicate=True))
        with pytest.raises(CommandIdConflictError, match=str(own)):
            bus.send(DOMAIN, "Debit", 2, command_id=own)


def test_a_refusal_is_told_to_its_caller_only(bus: SyncCommandBus, db: psycopg.Connection) -> None:
    db.execute("ALTER TABLE commandbus.command ADD CONSTRAINT antidote CHECK (data <> '13')")

    def send(n: int) -> object:
        try:
            return bus.send(DOMAIN, "Debit", n)
        except InvalidCommandError as error:
            return error

    ends = in_threads(16, send)
    assert [n for n, end in enumerate(ends) if not isinstance(end, Receipt)] == [13]


def test_a_session_that_ended_while_nobody_sent_fails_no_send(bus: SyncCommandBus, db: psycopg.Connection) -> None:
    db.execute("SELECT pg_terminate_backend(%s, 5000)", [lent_session(bus)])
    assert not bus.send(DOMAIN, "Debit", 1).duplicate
    assert of_type(db, "Debit") == 1


def test_nothing_is_lost_or_sent_twice_when_the_session_ends_again_and_again(
    bus: SyncCommandBus, db: psycopg.Connection, connect: Callable[..., psycopg.Connection]
) -> None:
    over = threading.Event()
    killed: list[int] = []

    def kill() -> None:
        other = connect(autocommit=True)
        while not over.wait(0.02):
            loan = bus._sender._loan
            if loan is not None and not loan.connection.closed:
                killed.append(loan.connection.info.backend_pid)
                other.execute("SELECT pg_terminate_backend(%s)", killed[-1:])

    with in_thread(kill):
        sent = in_threads(8, lambda n: [bus.send(DOMAIN, "Debit", n).command_id for _ in range(100)])
        over.set()
    assert len(killed) > 2
    assert sorted(command_id for thread in sent for command_id in thread) == sorted(
        found for (found,) in db.execute("SELECT command_id FROM commandbus.command WHERE command_type = 'Debit'")
    )


def test_who_waits_for_a_stuck_statement_goes_through_the_loop(
    bus: SyncCommandBus, gate: Gate, db: psycopg.Connection
) -> None:
    gate.shut("Slow")
    with in_thread(lambda: bus.send(DOMAIN, "Slow", 1)) as slow:
        eventually(gate.waiting)
        bus.send(DOMAIN, "Debit", 1)
        assert slow == []
        gate.open()
    assert [type(end) for end in slow] == [Receipt]
    assert of_type(db, "Slow") == 1


def test_a_statement_past_its_deadline_goes_on_through_the_loop(
    bus: SyncCommandBus, gate: Gate, db: psycopg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "CALL_SECONDS", 0.2)
    gate.shut("Slow")
    with in_thread(lambda: bus.send(DOMAIN, "Slow", 1)) as slow:
        eventually(lambda: gate.waiting() > 1)  # the one that was severed, and the next
        gate.open()
    assert [type(end) for end in slow] == [Receipt]
    assert of_type(db, "Slow") == 1


def test_what_is_carried_at_the_timeout_has_an_unknown_outcome_and_what_waits_is_withdrawn(
    runtime: SyncRuntime, dsn: str, gate: Gate, db: psycopg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sender, "_PATIENCE", 30)
    bus = lent(SyncCommandBus(dsn, runtime=runtime))
    gate.shut("Slow")
    with in_thread(lambda: bus.send(DOMAIN, "Slow", 1)) as carried:
        eventually(gate.waiting)
        bus.opened()._send_timeout = 0.1
        with loop_stopped(runtime), in_thread(lambda: bus.send(DOMAIN, "Waits", 1)) as waits:
            pass  # it is withdrawn here, and not passed on
        assert [type(end) for end in waits] == [SendTimeoutError]
        gate.open()
    bus.opened()._send_timeout = 0.3
    gate.shut("Slow")
    with in_thread(lambda: bus.send(DOMAIN, "Slow", 1)) as late:
        pass
    gate.open()
    assert [type(end) for end in carried] == [Receipt]
    assert [type(end) for end in late] == [OutcomeUnknownError]
    assert of_type(db, "Waits") == 0


class Late(Exception):  # noqa: N818 - not an error
    """What the alarm raises."""


@contextmanager
def alarm(ring: Callable[[], object]) -> Iterator[None]:
    """Call this in the main thread, soon."""

    def on_alarm(_: int, frame: FrameType | None) -> None:
        ring()

    before = signal.signal(signal.SIGALRM, on_alarm)
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def raise_late() -> None:
    raise Late


def test_a_leader_that_is_interrupted_leaves_nobody_behind(
    bus: SyncCommandBus, gate: Gate, db: psycopg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sender, "_PATIENCE", 30)
    gate.shut("Slow")

    def follow() -> Receipt:
        eventually(gate.waiting)
        return bus.send(DOMAIN, "Debit", 1)

    with in_thread(follow) as follower:
        with alarm(raise_late), pytest.raises(Late) as interrupted:
            bus.send(DOMAIN, "Slow", 1)
        assert ["may have been sent" in note for note in interrupted.value.__notes__] == [True]
    assert [type(end) for end in follower] == [Receipt]
    gate.open()
    assert isinstance(bus.send(DOMAIN, "Debit", 2), Receipt)


def test_a_follower_that_is_interrupted_is_withdrawn(
    bus: SyncCommandBus, gate: Gate, db: psycopg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sender, "_PATIENCE", 30)
    gate.shut("Slow")
    with in_thread(lambda: bus.send(DOMAIN, "Slow", 1)) as slow:
        eventually(gate.waiting)
        with alarm(raise_late), pytest.raises(Late) as interrupted:
            bus.send(DOMAIN, "Debit", 1)
        assert ["was not sent" in note for note in interrupted.value.__notes__] == [True]
        gate.open()
    assert [type(end) for end in slow] == [Receipt]
    assert of_type(db, "Debit") == 0


def test_a_handler_of_signals_may_send_while_its_thread_carries(
    bus: SyncCommandBus, gate: Gate, db: psycopg.Connection
) -> None:
    gate.shut("Slow")

    def send() -> None:
        bus.send(DOMAIN, "Signal", 1)
        gate.open()

    with alarm(send):
        bus.send(DOMAIN, "Slow", 1)
    assert (of_type(db, "Signal"), of_type(db, "Slow")) == (1, 1)


def test_a_leader_that_has_vanished_is_replaced(
    bus: SyncCommandBus, db: psycopg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two exceptions from outside, the second in the handling of the first: no code can exclude that."""
    monkeypatch.setattr(sender, "_PATIENCE", 0.05)
    monkeypatch.setattr(database, "CALL_SECONDS", 0.05)
    vanished = send_buffer.Parcel([bus.opened()._outgoing(SendRequest(DOMAIN, "Vanished", 1))], lambda: None)
    assert bus._sender._join(vanished)
    loan = bus._sender._loan
    assert loan is not None
    loan.in_use = True

    def replaced() -> int:
        bus.send(DOMAIN, "Debit", 1)
        return of_type(db, "Vanished")

    eventually(replaced)
    monkeypatch.undo()
    assert lent(bus)._sender._loan is not loan


def test_a_leader_that_has_vanished_does_not_hold_up_the_end(runtime: SyncRuntime, bus: SyncCommandBus) -> None:
    vanished = send_buffer.Parcel([bus.opened()._outgoing(SendRequest(DOMAIN, "Vanished", 1))], lambda: None)
    assert bus._sender._join(vanished)
    loan = bus._sender._loan
    assert loan is not None
    loan.in_use = True
    runtime.shutdown(timeout=0.05)
    assert isinstance(vanished.error, ClosedError)


def test_the_connection_goes_back_to_its_pool_now_and_then(
    runtime: SyncRuntime, dsn: str, db: psycopg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sender, "_LENT", 0.01)
    borrowed: list[object] = []
    borrow = sender.Sender.borrow

    async def counting(self: sender.Sender, connection: psycopg.AsyncConnection[Any]) -> Any:  # noqa: ANN401
        borrowed.append(connection)
        return await borrow(self, connection)

    monkeypatch.setattr(sender.Sender, "borrow", counting)
    bus = SyncCommandBus(dsn, runtime=runtime)
    in_threads(8, lambda n: [bus.send(DOMAIN, "Debit", n) for _ in range(200)])
    assert of_type(db, "Debit") == 1600
    assert len(borrowed) > 2


def test_workers_have_a_hint_of_what_threads_carry(
    bus: SyncCommandBus, connect: Callable[..., psycopg.Connection]
) -> None:
    listener = connect(autocommit=True)
    listener.execute("LISTEN commandbus")
    bus.send("billing", "Debit", 1)
    assert any(hint.payload == "billing" for hint in listener.notifies(timeout=20))
    with loop_stopped(bus.runtime):
        bus.send("shipping", "Debit", 2)
    bus.close()
    assert any(hint.payload == "shipping" for hint in listener.notifies(timeout=20))
    assert of_type(listener, "Debit") == 2


def test_shutting_down_waits_for_what_is_carried(
    runtime: SyncRuntime, bus: SyncCommandBus, gate: Gate, db: psycopg.Connection
) -> None:
    gate.shut("Slow")
    with in_thread(partial(bus.send, DOMAIN, "Slow", 1)) as carried:
        eventually(gate.waiting)
        with in_thread(runtime.shutdown):
            gate.open()
    assert [type(end) for end in carried] == [Receipt]
    assert of_type(db, "Slow") == 1


def test_shutting_down_in_vain_leaves_an_unknown_outcome(runtime: SyncRuntime, bus: SyncCommandBus, gate: Gate) -> None:
    gate.shut("Slow")
    with in_thread(partial(bus.send, DOMAIN, "Slow", 1)) as carried:
        eventually(gate.waiting)
        runtime.shutdown(timeout=0.05)
    assert [type(end) for end in carried] == [OutcomeUnknownError]
