"""A private PostgreSQL for the session, and a fresh database for each test that asks for one."""

from __future__ import annotations

import gc
import logging
import os
import signal
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from commandbus import CommandBus
from commandbus.embedded import EmbeddedPostgres
from commandbus.migrate import migrate
from commandbus.testing import fresh_database
from tests import blocking
from tests.pgbouncer import pgbouncer
from tests.sql.mutants import MUTANTS
from tests.support import Route, assert_sound

# Without fsync only a crash of the machine loses anything, and no test makes one. `synchronous_commit`, on
# which the tests of durability and of speed rest, keeps its default.
_SETTINGS = {"fsync": "off", "full_page_writes": "off", "max_connections": "200"}


def pytest_addoption(parser: pytest.Parser) -> None:
    """What a run can be told."""
    parser.addoption("--long", action="store_true", help="run the long variants of the tests that have one")
    parser.addoption("--mutant", choices=sorted(MUTANTS), help="run against a broken variant of the SQL functions")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "long: runs only with --long")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is long, or give it the time."""
    if config.getoption("long"):
        for item in items:
            item.add_marker(pytest.mark.timeout(7200), append=False)
        return
    left_out = [item for item in items if item.get_closest_marker("long")]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


@pytest.fixture(scope="session", autouse=True)
def _environment() -> Iterator[None]:
    """Keep the variables of the caller, and the folder of a server of theirs, away from every test."""
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory(prefix="commandbus-") as folder:
        for name in [name for name in os.environ if name.startswith("COMMAND_BUS_")]:
            if name != "COMMAND_BUS_PG_BIN":  # which PostgreSQL to test against
                patch.delenv(name)
        patch.setenv("COMMAND_BUS_DATA_DIR", str(Path(folder, "data")))
        # Started in the background, a shell lets its programs ignore Ctrl-C; those that the tests start must not.
        if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        yield


@pytest.fixture(scope="session")
def server(_environment: None) -> Iterator[EmbeddedPostgres]:
    """The PostgreSQL of this session, in a temporary folder, stopped and removed at its end."""
    with (
        tempfile.TemporaryDirectory(prefix="commandbus-") as folder,
        EmbeddedPostgres(Path(folder, "data"), settings=_SETTINGS) as server,
    ):
        yield server


@pytest.fixture(scope="session")
def template(server: EmbeddedPostgres, request: pytest.FixtureRequest) -> str:
    """The name of a migrated database that can only be cloned."""
    name = "commandbus_template"
    with psycopg.connect(server.dsn(), autocommit=True) as admin:
        admin.execute(sql.SQL("create database {}").format(sql.Identifier(name)))
        migrate(server.dsn(name))
        if mutant := request.config.getoption("mutant"):
            with psycopg.connect(server.dsn(name)) as owner:
                owner.execute(MUTANTS[mutant].sql().encode())
        admin.execute(
            sql.SQL("alter database {} with is_template true allow_connections false").format(sql.Identifier(name))
        )
    return name


@pytest.fixture
def dsn(request: pytest.FixtureRequest, server: EmbeddedPostgres, template: str) -> Iterator[str]:
    """The DSN of a migrated database of this test's own, in which `verify` finds nothing wrong after the test."""
    with fresh_database(server.dsn(), template) as dsn:
        yield dsn
        assert_sound(request, dsn)


@pytest.fixture
def empty_dsn(server: EmbeddedPostgres) -> Iterator[str]:
    """The DSN of an empty database of this test's own."""
    with fresh_database(server.dsn(), "template0") as dsn:
        yield dsn


@pytest.fixture
def connect(dsn: str) -> Iterator[Callable[..., psycopg.Connection]]:
    """Open a blocking connection to `dsn`: `connect(autocommit=True)`. Closed after the test."""
    opened: list[psycopg.Connection] = []

    def connect(*, autocommit: bool = False) -> psycopg.Connection:
        opened.append(psycopg.connect(dsn, autocommit=autocommit))
        return opened[-1]

    yield connect
    for connection in opened:
        connection.close()


@pytest.fixture
def db(connect: Callable[..., psycopg.Connection]) -> psycopg.Connection:
    """A blocking connection to `dsn` that commits each statement."""
    return connect(autocommit=True)


@pytest.fixture
def quiet_loop(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """A task that nobody waited for, an exception that nobody took: asyncio only logs these."""
    yield
    gc.collect()
    records = caplog.get_records("call") + caplog.get_records("teardown")
    assert [r.getMessage() for r in records if r.name == "asyncio" and r.levelno >= logging.ERROR] == []


@pytest.fixture(scope="session")
def pooler(server: EmbeddedPostgres) -> Iterator[str]:
    """A conninfo that leads to this session's server through a PgBouncer in transaction mode."""
    with pgbouncer(server.dsn()) as through:
        yield through


@pytest.fixture(params=["direct", "pooled", "sync"])
def route(request: pytest.FixtureRequest, dsn: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Route]:
    """How the bus comes to `dsn`: straight, through a transaction pooler, or straight with the blocking half.

    Whoever opens a bus runs in all three ways. In the third, `CommandBus`, `Worker` and `TroubleshootingQueue` are in
    the test's module those of `tests/blocking.py`.
    """
    if request.param == "sync":
        for name in blocking.TWINS.keys() & vars(request.module):
            monkeypatch.setattr(request.module, name, blocking.TWINS[name])
    if request.param == "pooled":
        database = conninfo_to_dict(dsn)["dbname"]
        yield {"dsn": make_conninfo(request.getfixturevalue("pooler"), dbname=database), "transaction_pooler": True}
    else:
        yield {"dsn": dsn}
    blocking.shutdown()


@pytest.fixture
async def bus(request: pytest.FixtureRequest, route: Route) -> AsyncIterator[CommandBus]:
    """An open bus on this test's database."""
    async with blocking.kinds(request.node.callspec.params["route"]).CommandBus(**route) as bus:
        yield bus
