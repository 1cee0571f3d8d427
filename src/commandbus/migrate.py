"""Brings the schema of a database to this version, or prints what that would run.

Tables come from numbered migrations, which only add. Functions and views come from plain files and are applied anew
each time. All of it is one transaction under one advisory lock: without the lock, two migrators at once failed 139
times of 400.

To replace a view takes its strongest lock, for which others that read it queue. So a lock that is not given in 200 ms
is given up, and everything is tried again a second later. Five views and an altered table make 1.2 s at most; and no
wait is as long as `deadlock_timeout`, so that where there is a deadlock it is the migration that gives way.
"""

from __future__ import annotations

import logging
import re
import time
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING

import psycopg

from commandbus._database import conninfo
from commandbus._failures import unavailable
from commandbus.errors import SchemaError

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable

_LOCK = "SELECT pg_advisory_xact_lock(hashtext('commandbus'), hashtext('migrate'))"
_PATIENCE = "SET LOCAL lock_timeout = '200ms'"
_PAUSE = 1.0  # seconds between two tries: in these, whoever queued behind the migration goes on
_SCHEMA = "CREATE SCHEMA IF NOT EXISTS commandbus"
_ROLES = (
    "INSERT INTO commandbus.setting (name, value) VALUES ('roles', 'on') "
    "ON CONFLICT (name) DO UPDATE SET value = excluded.value;"
)
_log = logging.getLogger("commandbus.migrate")


@dataclass(frozen=True, slots=True)
class Migration:
    """One numbered file. `oldest_client`: the oldest client, by its newest migration, that it leaves working."""

    version: int
    name: str
    oldest_client: int
    sql: str

    @property
    def record(self) -> str:
        """The statement that notes it as applied."""
        return (
            "INSERT INTO commandbus.migration (version, name, oldest_client) "  # noqa: S608 - from our own file names
            f"VALUES ({self.version}, '{self.name}', {self.oldest_client});"
        )


@cache
def migrations() -> tuple[Migration, ...]:
    """All migrations of this version, in order."""
    return tuple(_read(file) for file in _sql_files("migrations"))


def migrate(dsn: str | None = None, *, roles: bool = False) -> list[str]:
    """Bring the database to this version. Returns the names of the migrations that were applied, perhaps none.

    `dsn`: default `$COMMAND_BUS_DSN`. `roles`: from now on, only the roles `commandbus_sender`, `commandbus_worker`,
    `commandbus_operator` and `commandbus_reader` may use the schema, each what is listed for it; those that the cluster
    does not have are made, by a role that may. Later calls without it keep to that.

    Durable, all or nothing, when it returns. Idempotent; of two at once the second waits and finds nothing to do.
    While a transaction of somebody else holds what it needs, it is tried again every second, and holds nobody up.
    Raises `DatabaseUnavailableError`, or `SchemaError` when the database is ahead of this version: it never goes back.
    """
    told = False
    while True:
        try:
            return _try(dsn, roles=roles)
        except psycopg.errors.LockNotAvailable:
            if not told:
                _log.warning(
                    "the migration waits for a transaction that uses the schema commandbus, such as a long query on "
                    "one of its views: nothing is changed yet, and it is tried again every second; end that "
                    "transaction to go on at once"
                )
            told = True
        time.sleep(_PAUSE)


def pending(dsn: str | None = None) -> list[str]:
    """Return the names of the migrations that `migrate` would apply; changes nothing. Raises as `migrate` does."""
    with _connect(dsn) as connection:
        return [migration.name for migration in _pending(connection)]


def script(after: int = 0, *, roles: bool = False) -> str:
    """Return the SQL that brings a database from version `after` to this one, for another migration tool.

    `roles`: as for `migrate`.
    """
    parts = [f"{_LOCK};\n{_SCHEMA};\n"]
    for migration in migrations()[after:]:
        parts += [f"-- {migration.name}\n", migration.sql, migration.record, "\n"]
    if roles:
        parts.append(f"{_ROLES}\n")
    return "\n".join([*parts, _code()])


def explain_mismatch(version: int | None, oldest_client: int | None) -> str | None:
    """Say why a database at this version does not serve this client, and what to run; None when it does."""
    ours = migrations()[-1].version
    if version is None:
        return "this database has no commandbus schema: run `commandbus migrate`"
    if version < ours:
        return f"the schema is at version {version}, this client needs {ours}: run `commandbus migrate`"
    if oldest_client is not None and oldest_client > ours:
        return (
            f"the schema is at version {version} and serves clients from {oldest_client} on; this client is at "
            f"{ours}: upgrade the commandbus package"
        )
    return None


def _try(dsn: str | None, *, roles: bool) -> list[str]:
    with _connect(dsn) as connection:
        connection.execute(_LOCK)
        connection.execute(_PATIENCE)
        connection.execute(_SCHEMA)
        missing = _pending(connection)
        for migration in missing:
            connection.execute(migration.sql.encode())
            connection.execute(migration.record.encode())
        if roles:
            connection.execute(_ROLES)
        connection.execute(_code().encode())
    return [migration.name for migration in missing]


def _connect(dsn: str | None) -> psycopg.Connection:
    try:
        connection = psycopg.connect(conninfo(dsn, "commandbus migrate"))
    except psycopg.OperationalError as error:
        raise unavailable(error) from None
    # What somebody has put into a schema of the owner's path, such as `public`, is not called with the owner's rights.
    connection.execute("SET search_path = pg_catalog, pg_temp")
    return connection


def _pending(connection: psycopg.Connection) -> tuple[Migration, ...]:
    found = connection.execute("SELECT to_regclass('commandbus.migration')").fetchone()
    if found == (None,):
        return migrations()
    ((version,),) = connection.execute("SELECT coalesce(max(version), 0) FROM commandbus.migration").fetchall()
    ours = migrations()[-1].version
    if version > ours:
        raise SchemaError(
            f"the schema is at version {version}, this client knows only {ours}: it does not go backwards; "
            "upgrade the commandbus package"
        )
    return migrations()[version:]


def _code() -> str:
    parts = [file.read_text(encoding="utf-8") for file in _sql_files("functions")]
    views, roles = (files("commandbus").joinpath("sql", name).read_text("utf-8") for name in ("views.sql", "roles.sql"))
    return "\n".join([*parts, views, "SELECT commandbus.make_partitions_v1();\n", roles])


def _sql_files(folder: str) -> list[Traversable]:
    found = files("commandbus").joinpath("sql", folder).iterdir()
    return sorted((file for file in found if file.name.endswith(".sql")), key=lambda file: file.name)


def _read(file: Traversable) -> Migration:
    sql = file.read_text(encoding="utf-8")
    oldest = re.search(r"^-- oldest client: (\d+)$", sql, re.MULTILINE)
    name = file.name.removesuffix(".sql")
    if oldest is None or not re.fullmatch(r"\d{4}_\w+", name):
        raise SchemaError(f"migration {file.name}: no version number or no '-- oldest client: N' line")
    return Migration(int(name[:4]), name, int(oldest[1]), sql)
