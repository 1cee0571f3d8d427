"""One database for all tests of a module, emptied after each: a table of 200 cases is done in seconds."""

from __future__ import annotations

from collections.abc import Iterator
from uuid import uuid4

import psycopg
import pytest
from psycopg.sql import SQL, Identifier

from commandbus.embedded import EmbeddedPostgres
from tests.sql.support import empty
from tests.support import assert_sound, eventually

_OTHERS = """SELECT pg_terminate_backend(pid) FROM pg_stat_activity
             WHERE datname = current_database() AND pid <> pg_backend_pid() AND backend_type = 'client backend'"""


@pytest.fixture(scope="module")
def module_dsn(server: EmbeddedPostgres, template: str) -> Iterator[str]:
    """The DSN of a migrated database of this module's own."""
    name = f"sql_{uuid4().hex}"
    with psycopg.connect(server.dsn("postgres"), autocommit=True) as admin:
        admin.execute(SQL("CREATE DATABASE {} TEMPLATE {}").format(Identifier(name), Identifier(template)))
        yield server.dsn(name)
        admin.execute(SQL("DROP DATABASE {} WITH (FORCE)").format(Identifier(name)))


@pytest.fixture
def emptied_dsn(request: pytest.FixtureRequest, module_dsn: str) -> Iterator[str]:
    """The same, verified and without commands again after the test. A module takes it by calling it `dsn`."""
    yield module_dsn
    try:
        assert_sound(request, module_dsn)
    finally:
        _empty(module_dsn)


def _empty(module_dsn: str) -> None:
    with psycopg.connect(module_dsn, autocommit=True) as connection:
        eventually(lambda: connection.execute(_OTHERS).rowcount == 0, what="the end of the test's sessions")
        empty(connection)
        connection.execute("UPDATE commandbus.setting SET value = 'off' WHERE name = 'test_clock'")
