"""Time limits and modes that a DBA sets for the database: they delay commands, and cost none an attempt."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from datetime import timedelta
from functools import partial
from uuid import UUID

import pytest
from psycopg.sql import SQL, Identifier

from commandbus import (
    Command,
    CommandBus,
    DatabaseUnavailableError,
    HandlerContext,
    HandlerRegistry,
    OutcomeUnknownError,
    Receipt,
    SendRequest,
    SendTimeoutError,
    Worker,
)
from commandbus.embedded import EmbeddedPostgres
from commandbus.handlers import BlockingContext
from tests.bus.support import DOMAIN, Connect, Connection, Gate, Row, ids, lock_table, one, rows, until
from tests.support import Route, direct_only, eventually, sync_if_long
from tests.worker.support import AT_ONCE, HOUR, Watched, charged, registry_of, renewed, running

WRITE = "INSERT INTO public.ledger VALUES (%s) RETURNING pg_backend_pid()"
SECOND = timedelta(seconds=1)
# A slow machine must not meet these by chance, least of all where a handler's own statement would be charged with it.
BRIEF = "500ms"
LONG = "1500ms"
cut_short = pytest.mark.parametrize("setting", ["statement_timeout", "lock_timeout"])
# The settings are those of a session, and a pooler's have begun before: none of these runs through one.


def skip_if_too_old(server: EmbeddedPostgres, setting: str) -> None:
    """Skip the test if this PostgreSQL does not know the setting."""
    if setting == "transaction_timeout" and server.major < 17:
        pytest.skip("transaction_timeout came with PostgreSQL 17")


class Dba:
    """Says how sessions of this database begin from now on; those of the test itself have begun."""

    def __init__(self, db: Connection, connect: Connect) -> None:
        self.db = db
        self._connect = connect
        self._database = Identifier(one(db, "SELECT current_database()"))

    def rule(self, setting: str, value: str) -> None:
        """Set it for all sessions to come."""
        self.db.execute(SQL("ALTER DATABASE {} SET {} = {}").format(self._database, SQL(setting), value))

    def overrule(self) -> None:
        """Take everything back, for all sessions to come."""
        self.db.execute(SQL("ALTER DATABASE {} RESET ALL").format(self._database))

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Keep the table of commands to himself."""
        session = self._connect()
        lock_table(session, "command")
        try:
            yield
        finally:
            session.rollback()


@pytest.fixture
def dba(db: Connection, connect: Connect) -> Iterator[Dba]:
    dba = Dba(db, connect)
    yield dba
    dba.overrule()


async def ended(db: Connection, receipts: list[Receipt], status: str = "COMPLETED") -> None:
    """Come back when all of these have this status. Asks beside the bus, whose sessions have the limits."""
    sql = "SELECT count(*) FROM commandbus.commands WHERE command_id = ANY (%s) AND status = %s"
    found = [receipt.command_id for receipt in receipts]
    await until(lambda: one(db, sql, found, status) == len(receipts), f"{len(receipts)} commands {status}", 60)


# ------------------------------------------------------------------------------------- senders and readers


@direct_only
async def test_a_send_that_the_server_cuts_short_is_tried_again_and_then_given_up(
    route: Route, db: Connection, dba: Dba
) -> None:
    gate = Gate(db)
    gate.shut("Slow")
    dba.rule("statement_timeout", BRIEF)
    async with CommandBus(**route, send_timeout=3 * SECOND) as bus:
        said = "; the last try: .*statement timeout"
        with pytest.raises(
            (SendTimeoutError, OutcomeUnknownError), match=said
        ) as caught:  # between two tries, or in one
            await bus.send(DOMAIN, "Slow", {})
        assert caught.value.command_id not in ids(db)
    async with CommandBus(**route) as bus:
        sending = asyncio.create_task(bus.send(DOMAIN, "Slow", {}))
        await gate.reached()
        gate.open()
        assert ids(db) in ([(await sending).command_id], [])  # one whose try was cut short goes on
        assert ids(db) == [sending.result().command_id]


@direct_only
async def test_who_reads_or_cancels_is_told_what_the_server_said(route: Route, db: Connection, dba: Dba) -> None:
    dba.rule("statement_timeout", BRIEF)
    async with CommandBus(**route) as bus:
        receipt = await bus.send(DOMAIN, "Debit", {})
        with dba.alone():
            for call in (bus.count(), bus.get_command(receipt), bus.get_audit_trail(receipt), bus.cancel(receipt)):
                with pytest.raises(DatabaseUnavailableError, match=r"nothing was done: .*statement timeout"):
                    await call
        assert rows(db, "SELECT status FROM commandbus.commands") == [("PENDING",)]


@direct_only
async def test_a_send_whose_session_the_server_ends_has_an_unknown_outcome(
    route: Route, db: Connection, dba: Dba, server: EmbeddedPostgres
) -> None:
    skip_if_too_old(server, "transaction_timeout")
    gate = Gate(db)
    gate.shut("Slow")
    dba.rule("transaction_timeout", BRIEF)
    async with CommandBus(**route, send_timeout=2 * SECOND) as bus:
        with pytest.raises(OutcomeUnknownError) as caught:
            await bus.send(DOMAIN, "Slow", {})
        gate.open()
        receipt = await bus.send(DOMAIN, "Slow", {}, command_id=caught.value.command_id)
        assert ids(db) == [receipt.command_id]


@direct_only
async def test_a_database_that_takes_no_writes_is_waited_for(route: Route, db: Connection, dba: Dba) -> None:
    """Also by sessions that have begun meanwhile: the setting is theirs for life."""
    async with CommandBus(**route, send_timeout=SECOND) as bus:
        await bus.send(DOMAIN, "Debit", 0)
        dba.rule("default_transaction_read_only", "on")
        db.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
        with pytest.raises((SendTimeoutError, OutcomeUnknownError)):
            await bus.send(DOMAIN, "Debit", 1)
        with pytest.raises((SendTimeoutError, OutcomeUnknownError), match=r"; the last try: .*read-only"):
            await bus.send(DOMAIN, "Debit", 2)
        dba.overrule()
        receipt = await bus.send(DOMAIN, "Debit", 3)
        assert rows(db, "SELECT data FROM commandbus.command ORDER BY sent_at") == [(0,), (3,)]
        assert not receipt.duplicate


# -------------------------------------------------------------------------------------------------- workers


@sync_if_long(pooled=False)
@cut_short
async def test_outcomes_that_the_server_cuts_short_are_recorded_later_and_no_handler_runs_again(
    route: Route, db: Connection, dba: Dba, caplog: pytest.LogCaptureFixture, setting: str
) -> None:
    watched = Watched()

    async def fail(command: Command, context: HandlerContext) -> None:
        await watched(command, context)
        raise ValueError

    dba.rule(setting, LONG)
    registry = registry_of(Debit=watched.handler, Fail=fail)
    async with CommandBus(**route) as bus, running(Worker(bus, DOMAIN, registry, lease=HOUR)):
        sent = await bus.send_batch([SendRequest(DOMAIN, "Debit", n) for n in range(5)])
        failing = await bus.send_batch([SendRequest(DOMAIN, "Fail", n, max_attempts=1) for n in range(5)])
        await watched.started(10)
        with dba.alone():
            watched.go_on.set()
            await until(lambda: caplog.text.count("could not be recorded") > 2, "tries in vain")
            await until(lambda: "nothing could be claimed" in caplog.text, "a claim in vain")
        await ended(db, sent)
        await ended(db, failing, "IN_TROUBLESHOOTING_QUEUE")
    assert setting.replace("_", " ") in caplog.text
    assert len(watched.contexts) == 10
    assert charged(db) == [(1, 1, 0)]


class Ledger:
    """Transactional handlers of both colours that write to a table, and then wait until they may end."""

    def __init__(self, db: Connection) -> None:
        self._db = db
        self.begun = 0
        self.go_on = threading.Event()
        self.outlive_its_session = False
        db.execute("CREATE TABLE public.ledger (command_id uuid NOT NULL)")
        self.registry = HandlerRegistry()
        self.registry.handler(DOMAIN, "Async", transactional=True, retry=AT_ONCE)(self.debit)
        self.registry.handler(DOMAIN, "Def", transactional=True, retry=AT_ONCE)(self.debit_in_a_thread)

    async def debit(self, command: Command, context: HandlerContext) -> None:
        assert context.connection is not None
        cursor = await context.connection.execute(WRITE, [command.command_id])
        self.begun += 1
        await until(partial(self.may_end, await cursor.fetchone()), "its end", 60)

    def debit_in_a_thread(self, command: Command, context: BlockingContext[CommandBus]) -> None:
        assert context.connection is not None
        cursor = context.connection.execute(WRITE, [command.command_id])
        self.begun += 1
        eventually(partial(self.may_end, cursor.fetchone()), timeout=60)

    def may_end(self, session: Row | None) -> bool:
        if self.outlive_its_session:
            return not rows(self._db, "SELECT FROM pg_stat_activity WHERE pid = %s", *(session or ()))
        return self.go_on.is_set()

    def written(self) -> list[UUID]:
        return sorted(row[0] for row in rows(self._db, "SELECT command_id FROM public.ledger"))


@pytest.fixture
def ledger(db: Connection) -> Iterator[Ledger]:
    ledger = Ledger(db)
    yield ledger
    ledger.go_on.set()


@pytest.fixture
def pair() -> list[SendRequest]:
    return [SendRequest(DOMAIN, command_type, None) for command_type in ("Async", "Def")]


@sync_if_long(pooled=False)
@cut_short
async def test_a_transactional_handler_whose_completion_is_cut_short_is_rolled_back_and_not_charged(  # noqa: PLR0917
    route: Route,
    db: Connection,
    dba: Dba,
    ledger: Ledger,
    pair: list[SendRequest],
    caplog: pytest.LogCaptureFixture,
    setting: str,
) -> None:
    dba.rule(setting, LONG)
    async with CommandBus(**route) as bus, running(Worker(bus, DOMAIN, ledger.registry, lease=HOUR)):
        sent = await bus.send_batch(pair)
        await until(lambda: ledger.begun == 2, "both handlers")
        with dba.alone():
            ledger.go_on.set()
            await until(lambda: "could not be recorded" in caplog.text, "the end of both transactions")
        await ended(db, sent)
    assert setting.replace("_", " ") in caplog.text
    assert ledger.written() == sorted(receipt.command_id for receipt in sent)
    assert charged(db) == [(2, 1, 0)]


@sync_if_long(pooled=False)
@pytest.mark.parametrize("setting", ["idle_in_transaction_session_timeout", "transaction_timeout"])
async def test_a_transactional_handler_that_is_too_slow_for_the_dba_is_parked(  # noqa: PLR0917
    route: Route,
    db: Connection,
    dba: Dba,
    ledger: Ledger,
    pair: list[SendRequest],
    server: EmbeddedPostgres,
    setting: str,
) -> None:
    """The server ends its session. That is an attempt each time; else it would run for ever."""
    skip_if_too_old(server, setting)
    ledger.outlive_its_session = True
    dba.rule(setting, LONG)
    async with CommandBus(**route) as bus, running(Worker(bus, DOMAIN, ledger.registry, lease=HOUR)):
        await ended(db, await bus.send_batch(pair), "IN_TROUBLESHOOTING_QUEUE")
    assert ledger.begun == 2 * AT_ONCE.max_attempts
    assert ledger.written() == []
    assert charged(db) == [(3, 3, 0)]


@sync_if_long(pooled=False)
async def test_sessions_that_the_server_ends_for_idleness_cost_no_lease(
    route: Route, db: Connection, dba: Dba, caplog: pytest.LogCaptureFixture
) -> None:
    """Between two renewals, and between two calls, each session is idle for longer than it may."""
    watched = Watched()
    lease = timedelta(seconds=5)  # renewed after a third
    dba.rule("idle_session_timeout", BRIEF)
    async with (
        CommandBus(**route) as bus,
        running(Worker(bus, DOMAIN, registry_of(Debit=watched.handler), lease=lease)),
    ):
        receipt = await bus.send(DOMAIN, "Debit", None)
        await watched.started()
        await renewed(db, 2)
        watched.go_on.set()
        await ended(db, [receipt])
    assert charged(db) == [(1, 1, 0)]
    assert "could not be renewed" not in caplog.text
