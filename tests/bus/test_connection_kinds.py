"""`connection=` of every kind: what is sent goes with the caller's transaction, and wakes the workers after it."""

from __future__ import annotations

import asyncio
import gc
import sqlite3
import warnings
import weakref
from collections.abc import AsyncIterator, Callable
from uuid import uuid4

import psycopg
import pytest
import sqlalchemy
from sqlalchemy.orm import Session, sessionmaker

from commandbus import (
    CommandBus,
    CommandBusError,
    CommandIdConflictError,
    ConfigurationError,
    InvalidCommandError,
    SchemaError,
    SendRequest,
)
from commandbus._failures import driver_error, sqlstate
from tests.bus.callers import KINDS, Caller, open_caller
from tests.bus.support import DOMAIN, Connection, ids
from tests.support import Route, async_only, by_route

ASYNC = [kind for kind in KINDS if "async" in kind.lower().replace("asyncpg", "")]
SYNC_WAYS = [(kind, "thread") for kind in KINDS if kind not in ASYNC]
WAYS = [
    *((kind, "loop") for kind in KINDS if "Django" not in kind),  # Django refuses to block an event loop
    *((kind, "thread") for kind in ("psycopg Connection", "psycopg2 SQLAlchemy Session", "psycopg Django")),
]


def telling(ways: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Those that tell of their commits."""
    return [way for way in ways if "SQLAlchemy" in way[0] or "Django" in way[0]]


# Not through a pooler: the connections are the caller's own.
every_way = by_route("way", WAYS, sync=SYNC_WAYS, pooled=False)
every_telling_way = by_route("way", telling(WAYS), sync=telling(SYNC_WAYS), pooled=False)


@pytest.fixture
async def caller(way: tuple[str, str], dsn: str) -> AsyncIterator[Caller]:
    kind, where = way
    async with open_caller(kind, dsn, thread=where == "thread") as caller:
        yield caller


@pytest.fixture
async def autocommitting(way: tuple[str, str], dsn: str) -> AsyncIterator[Caller]:
    kind, where = way
    async with open_caller(kind, dsn, thread=where == "thread", autocommit=True) as caller:
        yield caller


def refuse_secrets(db: Connection) -> None:
    """Let the database refuse what the library takes."""
    db.execute("ALTER TABLE commandbus.command ADD CONSTRAINT open CHECK (data::text NOT LIKE '%secret%')")


def debit(n: object = 1, **more: object) -> SendRequest:
    return SendRequest(DOMAIN, "Debit", n, **more)  # type: ignore[arg-type]


# -- with the transaction, or not at all -------------------------------------------------------------------------------


@every_way
async def test_a_commit_sends(bus: CommandBus, db: Connection, caller: Caller) -> None:
    receipt = await caller.send(bus, debit({"name": "Zoë % $1 'quoted'"}))
    batch = await caller.send_batch(bus, [debit(n) for n in range(1200)])
    assert ids(db) == []
    await caller.commit()
    assert sorted(ids(db)) == sorted(sent.command_id for sent in [receipt, *batch])
    assert (await bus.get_command(receipt)).data == {"name": "Zoë % $1 'quoted'"}


@every_way
async def test_a_rollback_does_not(bus: CommandBus, db: Connection, caller: Caller) -> None:
    await caller.send(bus, debit())
    await caller.send_batch(bus, [debit(), debit()])
    await caller.rollback()
    assert ids(db) == []
    receipt = await caller.send(bus, debit())
    await caller.commit()
    assert ids(db) == [receipt.command_id]


@every_way
async def test_a_savepoint_of_the_callers_takes_its_own_back(bus: CommandBus, db: Connection, caller: Caller) -> None:
    kept = [await caller.send(bus, debit())]
    async with caller.savepoint(keep=True):
        kept += await caller.send_batch(bus, [debit(), debit()])
    async with caller.savepoint(keep=False):
        await caller.send(bus, debit())
        await caller.send_batch(bus, [debit(), debit()])
    await caller.commit()
    assert sorted(ids(db)) == sorted(receipt.command_id for receipt in kept)


@every_way
async def test_an_aborted_transaction_stays_the_callers_affair(bus: CommandBus, db: Connection, caller: Caller) -> None:
    with pytest.raises(Exception, match="division by zero"):
        await caller.do("SELECT 1/0")
    for send in (lambda: caller.send(bus, debit()), lambda: caller.send_batch(bus, [debit()])):
        with pytest.raises(Exception, match="transaction is aborted") as caught:
            await send()
        assert not isinstance(caught.value, CommandBusError)
        assert sqlstate(driver_error(caught.value)) == "25P02"
    await caller.rollback()
    assert ids(db) == []


# -- errors are ours, whatever wraps them ------------------------------------------------------------------------------


@every_way
async def test_an_id_again_is_a_duplicate_or_a_conflict(bus: CommandBus, db: Connection, caller: Caller) -> None:
    own = uuid4()
    assert not (await caller.send(bus, debit(1, command_id=own))).duplicate
    assert (await caller.send(bus, debit(1, command_id=own))).duplicate
    with pytest.raises(CommandIdConflictError):
        await caller.send(bus, debit(2, command_id=own))
    with pytest.raises(CommandIdConflictError):
        await caller.send_batch(bus, [debit(3), debit(2, command_id=own)])
    after = await caller.send(bus, debit(4))
    await caller.commit()
    assert sorted(ids(db)) == sorted([own, after.command_id])


@every_way
async def test_a_batch_that_fails_leaves_the_transaction_as_it_was(
    bus: CommandBus, db: Connection, caller: Caller
) -> None:
    refuse_secrets(db)
    receipt = await caller.send(bus, debit())
    for many in (1000, 1, 1, 1, 1, 1, 1):  # two chunks, and more often than a driver needs to prepare a statement
        with pytest.raises(InvalidCommandError, match="the batch was refused by PostgreSQL"):
            await caller.send_batch(bus, [*(debit(n) for n in range(many)), debit("secret")])
    await caller.commit()
    assert ids(db) == [receipt.command_id]


@every_way
async def test_a_refusal_does_not_quote_the_payload(bus: CommandBus, db: Connection, caller: Caller) -> None:
    refuse_secrets(db)
    with pytest.raises(InvalidCommandError, match="was refused by PostgreSQL") as caught:
        await caller.send(bus, debit("secret"))
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__
    assert "secret" not in str(caught.value)


@every_way
async def test_an_error_of_a_function_is_the_librarys_own(bus: CommandBus, db: Connection, caller: Caller) -> None:
    await caller.do("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
    with pytest.raises(ConfigurationError, match=r"READ COMMITTED only\. Let the library make the id") as caught:
        await caller.send(bus, debit("secret", command_id=uuid4()))
    assert "secret" not in str(caught.value.__cause__)
    await caller.rollback()
    assert ids(db) == []


@every_way
async def test_a_database_without_the_schema_is_told(bus: CommandBus, caller: Caller) -> None:
    await caller.do("DROP SCHEMA commandbus CASCADE")
    with pytest.raises(SchemaError, match="commandbus migrate"):
        await caller.send(bus, debit())


# -- autocommit --------------------------------------------------------------------------------------------------------


@every_way
async def test_with_autocommit_it_is_sent_at_once_with_a_warning(
    bus: CommandBus, db: Connection, autocommitting: Caller, hints: Connection
) -> None:
    with pytest.warns(UserWarning, match="in autocommit, outside a transaction"):
        receipt = await autocommitting.send(bus, debit())
    assert ids(db) == [receipt.command_id]
    assert await next_hints(hints, 1) == [DOMAIN]


@every_way
async def test_with_autocommit_a_batch_is_all_or_none(bus: CommandBus, db: Connection, autocommitting: Caller) -> None:
    own = uuid4()
    with pytest.warns(UserWarning, match="in autocommit"):
        receipts = await autocommitting.send_batch(bus, [debit(), debit(1, command_id=own)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it was said once
        with pytest.raises(CommandIdConflictError):
            await autocommitting.send_batch(bus, [debit(), debit(2, command_id=own)])
    assert sorted(ids(db)) == sorted(receipt.command_id for receipt in receipts)


@async_only("has an async connection")
async def test_the_warning_is_for_the_line_that_sends(bus: CommandBus, dsn: str) -> None:
    for kind in ("psycopg AsyncConnection", "psycopg2 SQLAlchemy Session"):
        async with open_caller(kind, dsn, thread=False, autocommit=True) as caller:
            with pytest.warns(UserWarning, match="in autocommit") as caught:
                await bus.send(DOMAIN, "Debit", {}, connection=caller.connection)
        assert [warning.filename for warning in caught] == [__file__]


@by_route("kind", ["psycopg Connection", "psycopg AsyncConnection"], sync=["psycopg Connection"])
async def test_a_transaction_on_an_autocommit_connection_is_one(
    bus: CommandBus, db: Connection, dsn: str, kind: str
) -> None:
    async with open_caller(kind, dsn, thread=False, autocommit=True) as caller:
        await caller.do("BEGIN")
        await caller.send_batch(bus, [debit()])
        await caller.do("ROLLBACK")
    assert ids(db) == []


# -- waking the workers ------------------------------------------------------------------------------------------------


@pytest.fixture
def hints(connect: Callable[..., Connection]) -> Connection:
    """A connection that listens."""
    listening = connect(autocommit=True)
    listening.execute("LISTEN commandbus")
    return listening


async def next_hints(hints: Connection, count: int) -> list[str]:
    """The next hints, at least so many, waited for without holding up the loop."""
    return await asyncio.to_thread(
        lambda: sorted(hint.payload for hint in hints.notifies(timeout=20, stop_after=count))
    )


@every_telling_way
async def test_a_commit_wakes_and_a_rollback_does_not(bus: CommandBus, caller: Caller, hints: Connection) -> None:
    await caller.send(bus, SendRequest("rolled_back", "Debit", 1))
    await caller.rollback()
    for n in range(3):  # a hint of an earlier transaction would come with a later one
        await caller.send(bus, SendRequest(f"domain_{n}", "Debit", 1))
        await caller.send_batch(bus, [SendRequest(f"other_{n}", "Debit", 1)] * 3)
        await caller.commit()
        assert await next_hints(hints, 2) == [f"domain_{n}", f"other_{n}"]


async def test_a_transaction_without_atomic_has_no_hook_and_is_one_all_the_same(
    bus: CommandBus, db: Connection, dsn: str
) -> None:
    async with open_caller("psycopg Django", dsn, thread=True, autocommit=True) as caller:
        for end, count in (("rollback", 0), ("commit", 1)):
            await caller.call(lambda: caller.connection.set_autocommit(False))
            await caller.send(bus, debit())
            assert ids(db) == []
            await caller.call(lambda end=end: getattr(caller.connection, end)())
            assert len(ids(db)) == count


@every_telling_way
async def test_a_commit_after_the_bus_was_closed_is_quiet(route: Route, caller: Caller, db: Connection) -> None:
    async with CommandBus(**route) as bus:
        await caller.send(bus, debit())
    await caller.send(CommandBus(**route), debit())  # never opened
    await caller.commit()
    assert len(ids(db)) == 2


@pytest.mark.parametrize("way", telling(WAYS), ids=" ".join)
async def test_a_commit_after_the_loop_has_ended_is_quiet(dsn: str, caller: Caller, db: Connection) -> None:
    async def elsewhere() -> CommandBus:
        bus = CommandBus(dsn)
        await bus.open()
        await bus.close()
        bus._closed = False  # as in a program whose loop was stopped before the bus could be closed
        return bus

    bus = await asyncio.to_thread(lambda: asyncio.run(elsewhere()))
    await caller.send(bus, debit())
    await caller.commit()
    assert len(ids(db)) == 1


@pytest.mark.parametrize("kind", ["psycopg SQLAlchemy Connection", "psycopg2 SQLAlchemy Session"])
async def test_listeners_do_not_pile_up_nor_keep_a_connection_alive(bus: CommandBus, dsn: str, kind: str) -> None:
    async with open_caller(kind, dsn, thread=False) as caller:
        mine = caller.connection
        connection = mine.connection() if isinstance(mine, Session) else mine
        for _ in range(50):
            await caller.send(bus, debit())
        assert len(list(connection.dispatch.commit)) == len(list(connection.dispatch.rollback)) == 1
        await caller.commit()
        gone = weakref.ref(connection)
        del connection, mine
    del caller
    gc.collect()
    assert gone() is None


# -- what is no connection ---------------------------------------------------------------------------------------------


async def test_the_message_for_anything_else_says_what_is_taken(bus: CommandBus, dsn: str) -> None:
    engine = sqlalchemy.create_engine("sqlite://")
    for wrong in (engine, sessionmaker(engine), object(), sqlite3.connect):
        with pytest.raises(ConfigurationError, match=r"psycopg, a Connection or Session of SQLAlchemy.*Django"):
            await bus.send(DOMAIN, "Debit", {}, connection=wrong)
    with engine.connect() as connection, pytest.raises(ConfigurationError, match="leads to sqlite"):
        await bus.send(DOMAIN, "Debit", {}, connection=connection)
    engine.dispose()


@by_route("kind", [], sync=ASYNC)
async def test_an_async_connection_is_refused_where_nothing_can_be_awaited(
    bus: CommandBus, dsn: str, kind: str
) -> None:
    async with open_caller(kind, dsn, thread=False) as caller:
        with pytest.raises(ConfigurationError, match=r"an async one \(Async"):
            await caller.send(bus, debit())


async def test_a_closed_connection_is_told_by_its_driver(bus: CommandBus, dsn: str) -> None:
    engine = sqlalchemy.create_engine("postgresql+psycopg://", creator=lambda: psycopg.connect(dsn))
    with psycopg.connect(dsn) as plain, engine.connect() as wrapped:
        pass
    for closed in (plain, wrapped):
        with pytest.raises(Exception, match="closed"):
            await bus.send(DOMAIN, "Debit", {}, connection=closed)
    engine.dispose()
