from __future__ import annotations

from collections.abc import Callable
from functools import partial
from threading import Event

import psycopg
import pytest
from psycopg.sql import SQL, Identifier

from commandbus.errors import ConfigurationError, SchemaError
from commandbus.migrate import explain_mismatch, migrate, migrations, pending, script
from tests.sql.support import (
    Connect,
    Connection,
    arrange,
    at_once,
    background,
    claim,
    complete_all,
    everything,
    impatient,
    one,
    operator_verb,
    outcome,
    rows,
    send_ids,
    sqlstate,
)
from tests.support import eventually

NAMES = [migration.name for migration in migrations()]


def catalog(dsn: str) -> dict[str, list[tuple[object, ...]]]:
    """What is in the schema: columns, constraints, indexes, functions with their source, views, settings."""
    queries = {
        "columns": """SELECT table_name, ordinal_position, column_name, data_type, collation_name, is_nullable,
                      column_default FROM information_schema.columns WHERE table_schema = 'commandbus'""",
        "constraints": """SELECT conrelid::regclass::text, conname, pg_get_constraintdef(oid) FROM pg_constraint
                          WHERE connamespace = 'commandbus'::regnamespace""",
        "indexes": "SELECT indexdef FROM pg_indexes WHERE schemaname = 'commandbus'",
        "tables": """SELECT relname, relkind::text, reloptions FROM pg_class
                     WHERE relnamespace = 'commandbus'::regnamespace""",
        "functions": """SELECT p.oid::regprocedure::text, pg_get_functiondef(p.oid) FROM pg_proc p
                        WHERE p.pronamespace = 'commandbus'::regnamespace""",
        "views": "SELECT viewname, definition FROM pg_views WHERE schemaname = 'commandbus'",
        "settings": "SELECT name, value FROM commandbus.setting",
        "migrations": "SELECT version, name, oldest_client FROM commandbus.migration",
    }
    with psycopg.connect(dsn) as connection:
        return {name: sorted(rows(connection, sql), key=str) for name, sql in queries.items()}


def test_an_empty_database_is_brought_here(empty_dsn: str) -> None:
    assert pending(empty_dsn) == NAMES
    assert migrate(empty_dsn) == NAMES
    assert pending(empty_dsn) == migrate(empty_dsn) == []


def test_again_changes_nothing(dsn: str, db: Connection) -> None:
    arrange(db, "COMPLETED")
    arrange(db, "PENDING")
    kept, before = everything(db), catalog(dsn)
    assert migrate(dsn) == []
    assert (everything(db), catalog(dsn)) == (kept, before)


def test_looking_at_what_is_pending_changes_nothing(empty_dsn: str) -> None:
    pending(empty_dsn)
    with psycopg.connect(empty_dsn) as connection:
        assert one(connection, "SELECT to_regnamespace('commandbus')") is None


def test_the_printed_script_does_the_same(dsn: str, empty_dsn: str) -> None:
    with psycopg.connect(empty_dsn) as connection:
        connection.execute(script().encode())
    assert catalog(empty_dsn) == catalog(dsn)
    assert pending(empty_dsn) == []


def test_the_script_for_a_database_that_is_here_only_applies_code(dsn: str) -> None:
    before = catalog(dsn)
    with psycopg.connect(dsn) as connection:
        connection.execute(script(after=len(NAMES)).encode())
    assert catalog(dsn) == before


@pytest.mark.parametrize("printed", [False, True])
def test_eight_migrators_at_once(empty_dsn: str, *, printed: bool) -> None:
    def run() -> list[str]:
        if not printed:
            return migrate(empty_dsn)
        with psycopg.connect(empty_dsn) as connection:
            connection.execute(script(after=len(NAMES)).encode())
        return []

    for _ in range(3):
        if printed:
            migrate(empty_dsn)
        with background() as pool:
            applied = at_once(pool, [run] * 8)
        assert sorted(applied)[:7] == [[]] * 7
        assert max(applied) == ([] if printed else NAMES)
        assert pending(empty_dsn) == []
        with psycopg.connect(empty_dsn) as connection:
            connection.execute("DROP SCHEMA commandbus CASCADE")


def test_all_or_nothing(empty_dsn: str) -> None:
    """What is in the way is a table of the same name in a schema that is there already."""
    with psycopg.connect(empty_dsn) as connection:
        connection.execute("CREATE SCHEMA commandbus; CREATE TABLE commandbus.audit_event ()")
    with pytest.raises(psycopg.errors.DuplicateTable):
        migrate(empty_dsn)
    assert pending(empty_dsn) == NAMES


def test_a_database_that_is_ahead_is_left_alone(dsn: str, db: Connection) -> None:
    db.execute("INSERT INTO commandbus.migration (version, name, oldest_client) VALUES (9999, '9999_later', 1)")
    db.execute("DROP FUNCTION commandbus.wake_v1(text[])")
    for call in (migrate, pending):
        with pytest.raises(SchemaError, match="9999"):
            call(dsn)
    assert one(db, "SELECT count(*) FROM pg_proc WHERE proname = 'wake_v1'") == 0


@pytest.mark.parametrize("call", [migrate, pending])
def test_what_is_no_dsn(call: Callable[[str], object]) -> None:
    with pytest.raises(ConfigurationError) as caught:
        call("postgresql://me:secret@[/x")
    assert "secret" not in str(caught.value)


OURS = len(NAMES)


@pytest.mark.parametrize(
    ("version", "oldest", "says"),
    [
        (OURS, 1, None),
        (OURS + 1, OURS, None),
        (None, None, "commandbus migrate"),
        (OURS - 1, 1, "commandbus migrate"),
        (OURS + 2, OURS + 1, "upgrade the commandbus package"),
    ],
)
def test_what_a_client_says_to_a_database(version: int | None, oldest: int | None, says: str | None) -> None:
    said = explain_mismatch(version, oldest)
    assert (said is None) if says is None else (says in str(said))


def test_the_database_says_where_it_is(db: Connection) -> None:
    assert rows(db, "SELECT * FROM commandbus.schema_v1()") == [(OURS, max(m.oldest_client for m in migrations()))]
    db.execute("INSERT INTO commandbus.migration (version, name, oldest_client) VALUES (9998, 'x', 9000)")
    db.execute("INSERT INTO commandbus.migration (version, name, oldest_client) VALUES (9999, 'y', 3)")
    assert rows(db, "SELECT * FROM commandbus.schema_v1()") == [(9999, 9000)]


def test_migrations_are_numbered_without_a_gap() -> None:
    assert [migration.version for migration in migrations()] == list(range(1, len(NAMES) + 1))
    assert all(1 <= migration.oldest_client <= migration.version for migration in migrations())


def test_functions_are_applied_anew_while_others_work(dsn: str, db: Connection, connect: Connect) -> None:
    ids = send_ids(db, 400)
    over = Event()
    with background() as pool:
        workers = [pool.submit(partial(work, connect(autocommit=True), over)) for _ in range(3)]
        try:
            for _ in range(4):
                assert migrate(dsn) == []
        finally:
            over.set()
        done = [answer for worker in workers for answer in worker.result()]
    assert sorted(done) == sorted(ids)


def work(connection: Connection, over: Event) -> list[str]:
    """Claim and complete until the queue is empty, and at least until it is over."""
    done: list[str] = []
    while leased := claim(connection, 5):
        done += complete_all(connection, leased)
    while not over.is_set():
        assert claim(connection, 1) == []
    return done


def test_a_session_that_is_open_while_migrating_goes_on(dsn: str, connect: Connect) -> None:
    """Its statements are prepared, its plans are cached; explicit columns keep them valid."""
    session = connect(autocommit=True)
    session.prepare_threshold = 0
    for _ in range(3):
        lease = arrange(session, "IN_PROGRESS")
        assert outcome(session, "complete", lease) == "done"
        migrate(dsn)
        session.execute("ALTER TABLE commandbus.command ADD COLUMN IF NOT EXISTS later integer")


def test_an_open_migration_holds_no_command_up(dsn: str, db: Connection) -> None:
    ids = send_ids(db, 2)
    with psycopg.connect(dsn) as migrating:
        migrating.execute(script(after=len(NAMES), roles=True).encode())
        db.execute("SET lock_timeout = '1ms'")
        assert sorted(complete_all(db, claim(db))) == sorted(ids)
        assert operator_verb(db, "cancel", *send_ids(db)) == "ok"
        assert sqlstate(lambda: rows(db, "SELECT FROM commandbus.commands")) == "55P03"  # but readers of views wait
        migrating.rollback()


def test_a_migration_that_waits_holds_nobody_up(
    dsn: str, db: Connection, connect: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    """Who reads a view queues behind the migration, which queues behind a long report: unless it gives way."""
    waiting = """SELECT l.pid FROM pg_locks l JOIN pg_stat_activity a USING (pid)
                 WHERE NOT l.granted AND l.relation = 'commandbus.commands'::regclass
                   AND a.application_name = 'commandbus migrate'"""
    report, reader = connect(), impatient(connect(autocommit=True))
    report.execute("SELECT FROM commandbus.commands")
    with background() as pool:
        migrating = pool.submit(migrate, dsn)
        try:
            tries = set[object]()
            while len(tries) < 3:
                tries.add(eventually(partial(rows, db, waiting), timeout=60, what="a migration that waits")[0])
                rows(reader, "SELECT FROM commandbus.commands")
            assert not migrating.done()
        finally:
            report.rollback()
        assert migrating.result() == []
    assert [record.name for record in caplog.records] == ["commandbus.migrate"]  # and says so once


def test_a_migration_calls_nothing_that_lies_in_the_path_of_its_owner(empty_dsn: str) -> None:
    """What anybody may have put into `public` would run with the rights of the owner."""
    with psycopg.connect(empty_dsn) as connection:
        connection.execute(
            "CREATE FUNCTION public.hashtext(text) RETURNS integer LANGUAGE plpgsql AS $$ BEGIN RAISE 'trapped'; END $$"
        )
        path = SQL("ALTER DATABASE {} SET search_path = public, pg_catalog")
        connection.execute(path.format(Identifier(connection.info.dbname)))
    with psycopg.connect(empty_dsn) as connection, pytest.raises(psycopg.errors.RaiseException, match="trapped"):
        connection.execute("SELECT hashtext('a')")
    assert migrate(empty_dsn) == NAMES
