"""Behind a pooler: what is shared there, and what a bus says that was not told of it.

That the rest works there too is shown by every test that asks for a `bus` or a `route`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

import pytest
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg.sql import SQL, Identifier

from commandbus import CommandBus, ConfigurationError
from commandbus.embedded import EmbeddedPostgres
from tests.bus.support import DOMAIN, Connection, ids, one
from tests.pgbouncer import POOL_SIZE, pgbouncer

Through = Callable[[str], str]


@pytest.fixture
def through(dsn: str) -> Through:
    """The DSN of this test's database through a pooler."""
    return lambda pooler: make_conninfo(pooler, dbname=conninfo_to_dict(dsn)["dbname"])


@pytest.fixture
def pooled_dsn(through: Through, pooler: str) -> str:
    return through(pooler)


async def test_many_connections_share_few_sessions(pooled_dsn: str, db: Connection) -> None:
    async with CommandBus(pooled_dsn, transaction_pooler=True, flush_connections=30) as bus:
        met = asyncio.Barrier(30)

        async def session() -> int:
            async with bus.database.connection() as connection:
                await met.wait()  # all of them at once
                row = await (await connection.execute("SELECT pg_backend_pid(), pg_sleep(0.01)")).fetchone()
                return int(row[0]) if row else 0

        assert 1 < len(set(await asyncio.gather(*(session() for _ in range(30))))) <= POOL_SIZE
        receipts = await asyncio.gather(*(bus.send(DOMAIN, "Debit", n) for n in range(500)))
    assert sorted(ids(db)) == sorted(receipt.command_id for receipt in receipts)


async def test_a_bus_that_was_not_told_of_a_pooler_says_what_to_do(pooled_dsn: str) -> None:
    """PgBouncer refuses the options of a bus, as it comes."""
    with pytest.raises(ConfigurationError, match=r"refuses the options.*transaction_pooler=True"):
        await CommandBus(pooled_dsn).open()


async def test_the_environment_tells_of_a_pooler(pooled_dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMMAND_BUS_TRANSACTION_POOLER", "1")
    bus = CommandBus(pooled_dsn)
    monkeypatch.setenv("COMMAND_BUS_TRANSACTION_POOLER", "perhaps")
    async with bus:
        assert await bus.count() == 0
    with pytest.raises(ConfigurationError, match="COMMAND_BUS_TRANSACTION_POOLER is 'perhaps'"):
        CommandBus(pooled_dsn)
    with pytest.raises(ConfigurationError, match="refuses the options"):
        await CommandBus(pooled_dsn, transaction_pooler=False).open()


async def test_a_pooler_that_ignores_options_is_noticed(server: EmbeddedPostgres, through: Through) -> None:
    """Prepared statements would fail there, or be somebody else's."""
    with (
        pgbouncer(server.dsn(), ignore_startup_parameters="options") as pooler,
        pytest.raises(ConfigurationError, match=r"transaction mode is in the way.*transaction_pooler=True"),
    ):
        await CommandBus(through(pooler)).open()


async def test_a_pooler_in_session_mode_needs_no_option(
    server: EmbeddedPostgres, through: Through, db: Connection, caplog: pytest.LogCaptureFixture
) -> None:
    with pgbouncer(server.dsn(), ignore_startup_parameters="options", pool_mode="session") as pooler:
        async with CommandBus(through(pooler)) as bus:
            for n in range(20):
                await bus.send(DOMAIN, "Debit", n)
        assert len(ids(db)) == 20
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING and r.name.startswith("command")]
    assert len(warnings) == 1
    assert "transaction_pooler=True" in warnings[0]


@pytest.mark.parametrize(
    ("setting", "value"), [("default_transaction_isolation", "serializable"), ("DateStyle", "SQL")]
)
async def test_sessions_that_begin_otherwise_are_refused(
    pooled_dsn: str, db: Connection, setting: str, value: str
) -> None:
    """A pooler takes no options, so that the settings of the database or the role count."""
    name = Identifier(one(db, "SELECT current_database()"))
    db.execute(SQL("ALTER DATABASE {} SET {} = {}").format(name, SQL(setting), value))
    with pytest.raises(ConfigurationError, match=rf"{setting} {value}.*ALTER ROLE"):
        await CommandBus(pooled_dsn, transaction_pooler=True).open()
