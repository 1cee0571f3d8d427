"""No connection is left, in the bus's pool or in the server: commands wait, no lease is lost and no attempt charged."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import psycopg
import pytest
from psycopg.conninfo import make_conninfo
from psycopg.sql import SQL, Identifier
from psycopg_pool import AsyncConnectionPool, PoolTimeout

from commandbus import (
    Command,
    CommandBus,
    DatabaseUnavailableError,
    HandlerContext,
    HandlerRegistry,
    OutcomeUnknownError,
    SendRequest,
    SendTimeoutError,
    Worker,
    _database,
)
from commandbus._database import Database
from commandbus.embedded import EmbeddedPostgres
from commandbus.handlers import BlockingContext
from commandbus.migrate import migrate
from tests import blocking
from tests.bus.support import DOMAIN, Connection, ids, in_progress, one, rows, terminate, until
from tests.support import Route, direct_only, eventually, sync_if_long
from tests.worker.support import (
    AT_ONCE,
    Watched,
    all_settled,
    charged,
    echo,
    registry_of,
    renewed,
    running,
    settled,
)

LEASE = timedelta(seconds=5)  # renewed after a third; a slow machine must not lose it by itself
MINUTE = timedelta(minutes=1)
WRITE = "INSERT INTO public.ledger VALUES (%s)"
ROOM = 12  # what the limited login may have


class Limited:
    """A login that may have few connections, and who takes all that are left of them."""

    def __init__(self, dsn: str, db: Connection, name: str) -> None:
        self.dsn = make_conninfo(dsn, user=name)
        self._db = db
        self._name = name
        self._hogs: list[psycopg.Connection] = []

    def exhaust(self) -> None:
        """Take every connection that is left."""
        with contextlib.suppress(psycopg.OperationalError):
            while True:
                self._hogs.append(psycopg.connect(make_conninfo(self.dsn, application_name="hog")))

    def kill_all_but_the_hogs(self) -> None:
        """End the sessions of the library, and take their places too."""
        others = "FROM pg_stat_activity WHERE usename = %s AND application_name <> 'hog'"

        def alone() -> bool:
            rows(self._db, f"SELECT pg_terminate_backend(pid) {others}", self._name)
            self.exhaust()
            return len(self._hogs) == ROOM and one(self._db, f"SELECT count(*) {others}", self._name) == 0

        eventually(alone)

    def relieve(self) -> None:
        """Give the connections back, and wait until the server has noticed."""
        while self._hogs:
            self._hogs.pop().close()
        hogs = "SELECT count(*) FROM pg_stat_activity WHERE usename = %s AND application_name = 'hog'"
        eventually(lambda: one(self._db, hogs, self._name) == 0)


@pytest.fixture
def limited(dsn: str, db: Connection) -> Iterator[Limited]:
    migrate(dsn, roles=True)
    name = f"login_{uuid4().hex}"
    db.execute(SQL("CREATE ROLE {} LOGIN CONNECTION LIMIT {}").format(Identifier(name), ROOM))
    roles = SQL(", ").join(Identifier(f"commandbus_{role}") for role in ("sender", "worker", "reader"))
    db.execute(SQL("GRANT {} TO {}").format(roles, Identifier(name)))
    db.execute("CREATE TABLE public.ledger (command_id uuid NOT NULL)")
    db.execute(SQL("GRANT INSERT ON public.ledger TO {}").format(Identifier(name)))
    limited = Limited(dsn, db, name)
    yield limited
    limited.relieve()
    db.execute(SQL("DROP OWNED BY {}").format(Identifier(name)))
    db.execute(SQL("DROP ROLE {}").format(Identifier(name)))


# ------------------------------------------------------------------------------------------- the bus's pool


@sync_if_long(pooled=True)
async def test_busy_handlers_on_the_smallest_pool_all_end_with_their_first_delivery(
    route: Route, db: Connection
) -> None:
    """32 at once on 3 connections, each with more to ask than there is, for longer than a lease."""
    together, over = asyncio.Barrier(32), asyncio.Event()

    async def busy(command: Command, context: HandlerContext) -> int:
        await together.wait()
        while not over.is_set():
            receipt = await context.bus.send("other", "Debit", None)
            await asyncio.gather(context.bus.get_command(receipt), context.bus.count(domain="other"))
        return context.delivery

    async with (
        CommandBus(**route, flush_connections=1) as bus,
        running(Worker(bus, DOMAIN, registry_of(Debit=busy), lease=LEASE)),
    ):
        sent = await bus.send_batch([SendRequest(DOMAIN, "Debit", n) for n in range(32)])
        await until(lambda: together.n_waiting == 0 and in_progress(db) == 32, "all of them")
        await renewed(db, 4)
        over.set()
        assert [command.result for command in await all_settled(bus, sent)] == [1] * 32
    assert charged(db) == [(1, 1, 0)]


async def test_connections_that_are_never_given_back_cost_no_lease(dsn: str, db: Connection) -> None:
    """Nobody claims or completes meanwhile, but renewals have a connection of their own."""
    watched = Watched()
    async with (
        CommandBus(dsn, flush_connections=1) as bus,
        running(Worker(bus, DOMAIN, registry_of(Debit=watched.handler), lease=LEASE)),
    ):
        receipt = await bus.send(DOMAIN, "Debit", None)
        await watched.started()
        pool = bus.database._pool
        leaked = [await pool.getconn() for _ in range(pool.max_size)]
        watched.go_on.set()
        await renewed(db, 2)
        assert one(db, "SELECT status FROM commandbus.commands") == "IN_PROGRESS"
        for connection in leaked:
            await pool.putconn(connection)
        assert (await settled(bus, receipt)).result == "delivery 1"
    assert charged(db) == [(1, 1, 0)]


# ------------------------------------------------------------------------------------------------ the server


@direct_only
async def test_a_bus_that_gets_no_connection_says_why_and_opens_later(
    route: Route, limited: Limited, db: Connection
) -> None:
    limited.exhaust()
    with pytest.raises(DatabaseUnavailableError, match="too many connections for role"):
        await CommandBus(**route | {"dsn": limited.dsn}).open()
    limited.relieve()
    async with CommandBus(**route | {"dsn": limited.dsn}) as bus:
        receipt = await bus.send(DOMAIN, "Debit", None)
    assert ids(db) == [receipt.command_id]


@direct_only
async def test_a_send_without_a_connection_is_withdrawn_and_the_next_one_arrives(
    route: Route, limited: Limited, db: Connection
) -> None:
    async with CommandBus(**route | {"dsn": limited.dsn}, send_timeout=timedelta(seconds=1)) as bus:
        limited.kill_all_but_the_hogs()
        with pytest.raises((SendTimeoutError, OutcomeUnknownError)):
            await bus.send(DOMAIN, "Debit", 1)
        with pytest.raises(SendTimeoutError) as caught:
            await bus.send(DOMAIN, "Debit", 2)
        assert caught.value.command_id not in ids(db)
        limited.relieve()
        async with asyncio.timeout(30):
            while 3 not in [row[0] for row in rows(db, "SELECT data FROM commandbus.command")]:
                with contextlib.suppress(SendTimeoutError, OutcomeUnknownError):
                    await bus.send(DOMAIN, "Debit", 3)


@sync_if_long(pooled=False)
async def test_a_first_long_lease_is_renewed_though_no_connection_is_left(
    route: Route, limited: Limited, db: Connection
) -> None:
    """The renewals' own was made before the first claim: nobody can take it."""
    watched = Watched()
    registry = registry_of(Debit=watched.handler, Echo=echo)
    async with (
        CommandBus(**route) as sender,
        CommandBus(**route | {"dsn": limited.dsn}) as bus,
        running(Worker(bus, DOMAIN, registry, lease=LEASE)),
    ):
        await settled(sender, await sender.send(DOMAIN, "Echo", None))
        limited.exhaust()
        receipt = await sender.send(DOMAIN, "Debit", None)
        await watched.started()
        await renewed(db, 2)
        watched.go_on.set()
        assert (await settled(sender, receipt)).result == "delivery 1"
    assert charged(db) == [(1, 1, 0)]


@sync_if_long(pooled=False)
async def test_a_worker_that_has_no_connection_for_renewals_claims_nothing(
    route: Route, limited: Limited, db: Connection, caplog: pytest.LogCaptureFixture
) -> None:
    async with CommandBus(**route) as sender, CommandBus(**route | {"dsn": limited.dsn}) as bus:
        limited.exhaust()
        receipt = await sender.send(DOMAIN, "Echo", None)
        with caplog.at_level(logging.DEBUG, "commandbus.worker"):
            async with running(Worker(bus, DOMAIN, registry_of(Echo=echo), lease=LEASE)):
                await until(lambda: caplog.text.count("leases could not be renewed") > 3, "tries to connect")
                assert one(db, "SELECT status FROM commandbus.commands") == "PENDING"
                limited.relieve()
                await settled(sender, receipt)
    assert charged(db) == [(1, 1, 0)]


@sync_if_long(pooled=False)
async def test_outcomes_wait_for_a_connection(
    route: Route,
    limited: Limited,
    db: Connection,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All sessions of a worker are killed, and others take their places for a while."""
    watched = Watched()
    async with (
        CommandBus(**route) as sender,
        CommandBus(**route | {"dsn": limited.dsn}) as bus,
        running(Worker(bus, DOMAIN, registry_of(Debit=watched.handler), lease=MINUTE)),
    ):
        sent = await sender.send_batch([SendRequest(DOMAIN, "Debit", n) for n in range(10)])
        await watched.started(10)
        monkeypatch.setattr(_database, "CALL_SECONDS", 1.0)  # not 10
        limited.kill_all_but_the_hogs()
        watched.go_on.set()
        await until(lambda: "could not be recorded" in caplog.text, "an outcome that waits", 40)
        limited.relieve()
        assert {command.result for command in await all_settled(sender, sent)} == {"delivery 1"}
    assert charged(db) == [(1, 1, 0)]


async def debit(command: Command, context: HandlerContext) -> None:
    assert context.connection is not None
    await context.connection.execute(WRITE, [command.command_id])


def debit_in_a_thread(command: Command, context: BlockingContext[CommandBus]) -> None:
    assert context.connection is not None
    context.connection.execute(WRITE, [command.command_id])


@pytest.fixture
def in_vain(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """An item for each time that a connection for a handler was asked for, and there was none."""
    found: list[None] = []
    getconn, connect_blocking = AsyncConnectionPool.getconn, Database.connect_blocking

    async def counting_getconn(pool: AsyncConnectionPool[Any], timeout: float | None = None) -> Any:  # noqa: ANN401
        try:
            return await getconn(pool, timeout)
        except PoolTimeout:
            found.append(None)
            raise

    def counting_connect_blocking(database: Database) -> Any:  # noqa: ANN401 - a connection
        try:
            return connect_blocking(database)
        except DatabaseUnavailableError:
            found.append(None)
            raise

    monkeypatch.setattr(AsyncConnectionPool, "getconn", counting_getconn)
    monkeypatch.setattr(Database, "connect_blocking", counting_connect_blocking)
    return found


@sync_if_long(pooled=False)
@pytest.mark.parametrize("handler", [debit, debit_in_a_thread], ids=["async", "def"])
async def test_a_transactional_handler_waits_for_its_connection_and_is_not_charged(
    route: Route,
    limited: Limited,
    db: Connection,
    in_vain: list[None],
    handler: Any,  # noqa: ANN401
) -> None:
    registry = HandlerRegistry()
    registry.handler(DOMAIN, "Debit", transactional=True, retry=AT_ONCE)(handler)
    async with (
        CommandBus(**route) as sender,
        CommandBus(**route | {"dsn": limited.dsn}) as bus,
        running(Worker(bus, DOMAIN, registry, lease=MINUTE)),
    ):
        await settled(sender, await sender.send(DOMAIN, "Debit", None))
        await until(lambda: terminate(db, "RESET SESSION"), "the handler's session, back in the pool")
        await until(lambda: not terminate(db, "RESET SESSION"), "its end")
        limited.exhaust()
        receipt = await sender.send(DOMAIN, "Debit", None)
        await until(lambda: len(in_vain) > 1, "tries to connect", 40)
        limited.relieve()
        await settled(sender, receipt)
    assert charged(db) == [(1, 1, 0)]
    assert one(db, "SELECT count(*) FROM public.ledger") == 2


@pytest.mark.parametrize("half", ["async", pytest.param("sync", marks=pytest.mark.long)])
async def test_a_server_without_connections_costs_no_lease(tmp_path: Path, half: str) -> None:
    """Not a login's limit but the server's own: "too many clients"."""
    watched = Watched()
    kinds = blocking.kinds(half)
    with (
        EmbeddedPostgres(tmp_path / "data", settings={"fsync": "off", "max_connections": "20"}) as server,
        psycopg.connect(server.dsn(), autocommit=True) as db,
    ):
        migrate(server.dsn())
        everybody = Limited(server.dsn(), db, "postgres")
        async with (
            kinds.CommandBus(server.dsn()) as bus,
            running(kinds.Worker(bus, DOMAIN, registry_of(Debit=watched.handler), lease=LEASE)),
        ):
            receipt = await bus.send(DOMAIN, "Debit", None)
            await watched.started()
            everybody.exhaust()
            with pytest.raises(DatabaseUnavailableError, match="too many clients"):
                await kinds.CommandBus(server.dsn()).open()
            await renewed(db, 2)
            watched.go_on.set()
            assert (await settled(bus, receipt)).result == "delivery 1"
            everybody.relieve()
            async with kinds.CommandBus(server.dsn()) as another:
                await settled(another, await another.send(DOMAIN, "Debit", None))
        assert charged(db) == [(1, 1, 0)]
    blocking.shutdown()
