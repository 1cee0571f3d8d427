"""Who may do what: each role with each function and relation, and what somebody hostile puts into the way."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
import pytest
from psycopg.sql import SQL, Identifier

from commandbus._failures import rights
from commandbus.embedded import EmbeddedPostgres
from commandbus.migrate import migrate, migrations, script
from tests.sql.support import (
    Connect,
    Connection,
    arrange,
    background,
    claim,
    item,
    move_clock_to,
    one,
    outcome,
    rows,
    send_ids,
    sqlstate,
    start_waiting,
    status_of,
)

ROLES = ("commandbus_sender", "commandbus_worker", "commandbus_operator", "commandbus_reader")
STRANGER = "a_stranger"  # with no right at all
GUEST = "a_guest"  # with USAGE of the schema: what such a one may, PUBLIC may
ACTORS = (*ROLES, STRANGER, GUEST)
DENIED = "42501"
HERE = "'commandbus'::regnamespace"
CODE = script(after=len(migrations()))


@pytest.fixture(scope="module")
def module_dsn(module_dsn: str) -> Iterator[str]:
    """The module's database, with roles."""
    migrate(module_dsn, roles=True)
    with psycopg.connect(module_dsn, autocommit=True) as db:
        for name in (STRANGER, GUEST):
            db.execute(SQL("CREATE ROLE {}").format(Identifier(name)))
        db.execute(SQL("GRANT USAGE ON SCHEMA commandbus TO {}").format(Identifier(GUEST)))
    yield module_dsn
    with psycopg.connect(module_dsn, autocommit=True) as db:
        for name in (STRANGER, GUEST):
            db.execute(SQL("DROP OWNED BY {0}; DROP ROLE {0}").format(Identifier(name)))


@pytest.fixture
def dsn(emptied_dsn: str) -> str:
    return emptied_dsn


def functions(db: Connection) -> list[str]:
    return [name for (name,) in rows(db, f"SELECT DISTINCT proname FROM pg_proc WHERE pronamespace = {HERE}")]


def relations(db: Connection, *kinds: str) -> list[str]:
    sql = f"SELECT relname FROM pg_class WHERE relnamespace = {HERE} AND relkind::text = ANY (%s)"
    return [name for (name,) in rows(db, sql, list(kinds))]


def listed_for(actor: str) -> set[str]:
    return {name for name, roles in rights().items() if actor in roles}


def attempt(db: Connection, actor: str, statement: str) -> str:
    """Execute this as `actor`, and undo it; returns the SQLSTATE, or ok."""
    with db.transaction(force_rollback=True):
        db.execute(SQL("SET LOCAL ROLE {}").format(Identifier(actor)))
        return sqlstate(lambda: db.execute(statement.encode()))


# ----------------------------------------------------------------------------------- roles and objects


def test_every_public_function_and_view_is_in_the_list(db: Connection) -> None:
    public = {name for name in functions(db) if re.search(r"_v\d+$", name)}
    assert set(rights()) == public | set(relations(db, "v")) | {"clock", "_fingerprint"}  # called by views
    assert {role for roles in rights().values() for role in roles} == set(ROLES)


def test_the_roles_cannot_log_in_and_are_nothing_special(db: Connection) -> None:
    special = "rolcanlogin OR rolsuper OR rolcreaterole OR rolcreatedb OR rolreplication OR rolbypassrls"
    plain = f"SELECT rolname FROM pg_roles WHERE rolname = ANY (%s) AND NOT ({special})"
    assert {name for (name,) in rows(db, plain, list(ROLES))} == set(ROLES)


@pytest.mark.parametrize("actor", ACTORS)
def test_a_role_calls_the_functions_of_its_list_and_no_other(db: Connection, actor: str) -> None:
    """A right is checked before the body runs; what the body says to nothing but nulls does not matter."""
    sql = f"""SELECT p.proname, format('SELECT commandbus.%I(%s)', p.proname, (
                  SELECT string_agg('NULL::' || format_type(t, NULL), ', ') FROM unnest(p.proargtypes) t))
              FROM pg_proc p WHERE p.pronamespace = {HERE}"""
    calls = rows(db, sql)
    assert len(calls) >= 30
    may = {name for name, call in calls if attempt(db, actor, call) != DENIED}
    assert may == listed_for(actor) & set(functions(db))


@pytest.mark.parametrize("actor", ACTORS)
def test_a_role_reads_the_views_of_its_list_and_touches_no_table(db: Connection, actor: str) -> None:
    tables = relations(db, "r", "p")
    assert len(tables) >= 18  # ten of them are weeks
    done = set()
    for name in [*tables, *relations(db, "v")]:
        (column,) = rows(db, f"SELECT attname FROM pg_attribute WHERE attrelid = 'commandbus.{name}'::regclass "
                             "AND attnum = 1")[0]  # fmt: skip
        verbs = [f"SELECT FROM commandbus.{name}", f"SELECT {column} FROM commandbus.{name}"]
        if name in tables:
            verbs += [
                f"INSERT INTO commandbus.{name} DEFAULT VALUES",
                f"UPDATE commandbus.{name} SET {column} = NULL",
                f"DELETE FROM commandbus.{name}",
                f"TRUNCATE commandbus.{name}",
                f"LOCK TABLE commandbus.{name} IN ACCESS SHARE MODE",
                f"DROP TABLE commandbus.{name}",
            ]
        done |= {name for verb in verbs if attempt(db, actor, verb) != DENIED}
    assert done == listed_for(actor) & set(relations(db, "v"))


@pytest.mark.parametrize("actor", ACTORS)
def test_no_role_has_more_of_a_relation_than_select(db: Connection, actor: str) -> None:
    """Of a view, PostgreSQL looks at what can be updated before it looks at the rights."""
    more = "INSERT, UPDATE, DELETE, TRUNCATE, REFERENCES, TRIGGER"
    sql = f"""SELECT relname FROM pg_class WHERE relnamespace = {HERE} AND relkind IN ('r', 'p', 'v')
              AND (has_table_privilege(%s, oid, '{more}')
                   OR has_any_column_privilege(%s, oid, 'INSERT, UPDATE, REFERENCES'))"""
    assert rows(db, sql, actor, actor) == []


@pytest.mark.parametrize("actor", ACTORS)
def test_no_role_touches_the_sequence(db: Connection, actor: str) -> None:
    assert relations(db, "S") == ["command_seq"]
    name = "'commandbus.command_seq'"
    for verb in (
        f"nextval({name})",
        f"setval({name}, 1)",
        f"currval({name})",
        "last_value FROM commandbus.command_seq",
    ):
        assert attempt(db, actor, f"SELECT {verb}") == DENIED


@pytest.mark.parametrize("actor", ACTORS)
def test_no_role_makes_or_changes_anything_in_the_schema(db: Connection, actor: str) -> None:
    for statement in (
        "CREATE TABLE commandbus.mine ()",
        "CREATE VIEW commandbus.mine AS SELECT 1",
        "CREATE FUNCTION commandbus.wake_v1(text) RETURNS void LANGUAGE sql AS ''",
        "CREATE OR REPLACE FUNCTION commandbus.clock() RETURNS timestamptz LANGUAGE sql AS 'SELECT now()'",
        "ALTER FUNCTION commandbus.schema_v1() RESET ALL",
        "DROP FUNCTION commandbus.schema_v1()",
        "ALTER SCHEMA commandbus RENAME TO mine",
    ):
        assert attempt(db, actor, statement) == DENIED, statement
    assert not one(db, "SELECT has_schema_privilege(%s, 'commandbus', 'CREATE')", actor)


# ------------------------------------------------------------------------------------ the life of a command


@contextmanager
def acting(session: Connection, actor: str) -> Iterator[Connection]:
    session.execute(SQL("SET ROLE {}").format(Identifier(actor)))
    yield session
    session.execute("RESET ROLE")


def live(session: Connection) -> list[str]:
    """Let each role do its part, with everything that its functions do in earnest; returns the ids."""
    with acting(session, "commandbus_sender"):
        ids = send_ids(session, 3)
        session.execute("SELECT commandbus.wake_v1('{d}'), commandbus.cancel_v1('d', %s, NULL, NULL)", [ids[2]])
    with acting(session, "commandbus_worker"):
        leased = claim(session, sweep=True)
        assert [outcome(session, "renew", item(lease)) for lease in leased] == ["done", "done"]
        assert outcome(session, "release", item(leased[0])) == "done"
        assert outcome(session, "fail PERMANENT", item(leased[1])) == "done"
        session.execute("SELECT commandbus.drop_expired_v1(), commandbus.drop_finished_v1()")
        session.execute("SELECT commandbus.make_partitions_v1(), commandbus.schema_v1()")
    with acting(session, "commandbus_operator"):
        parked = str(leased[1]["command_id"])
        session.execute("SELECT commandbus.operator_retry_v1('d', %s, 'ana', 'why', '1')", [parked])
    with acting(session, "commandbus_worker"):
        assert [outcome(session, "complete", item(lease)) for lease in claim(session)] == ["done", "done"]
    return ids


def test_together_the_roles_carry_a_command_through_its_life(db: Connection) -> None:
    assert sorted(status_of(db, command_id) for command_id in live(db)) == ["CANCELED", "COMPLETED", "COMPLETED"]


def test_nothing_that_a_session_puts_into_the_way_is_used(db: Connection, connect: Connect) -> None:
    """Its own tables, types, functions and operators, temporary ones and those of a schema that comes first.

    Three functions of the same kind that take less care show that the traps are set.
    """
    hostile = connect(autocommit=True)
    lay_traps(db)
    for name in relations(db, "r", "p", "v", "S"):
        if not re.search(r"_\d{4}w\d\d$", name):
            hostile.execute(SQL("CREATE TEMP TABLE {} (name text, value text)").format(Identifier(name)))
    hostile.execute("INSERT INTO pg_temp.setting VALUES ('test_clock', 'on'), ('retention', '1 second')")
    hostile.execute("CREATE TYPE pg_temp.uuid AS (x text); CREATE TYPE pg_temp.tid AS (x text)")
    hostile.execute("CREATE FUNCTION pg_temp.clock() RETURNS timestamptz LANGUAGE sql AS 'SELECT to_timestamp(0)'")
    hostile.execute("SET search_path = pg_temp, traps, pg_catalog")
    for call in ("traps.calls()", "traps.compares('a')"):
        with pytest.raises(psycopg.errors.RaiseException, match="trapped"):
            hostile.execute(f"SELECT {call}".encode())
    assert one(hostile, "SELECT traps.reads()") == "on"
    assert sorted(status_of(db, command_id) for command_id in live(hostile)) == ["CANCELED", "COMPLETED", "COMPLETED"]
    db.execute("DROP SCHEMA traps CASCADE")


TRAPPED = "LANGUAGE plpgsql AS $$ BEGIN RAISE 'trapped'; END $$"
FUNCTIONS = {
    "clock_timestamp()": "timestamptz",
    "gen_random_uuid()": "uuid",
    "nextval(regclass)": "bigint",
    "pg_notify(text, text)": "void",
    "set_config(text, text, boolean)": "text",
    "current_setting(text, boolean)": "text",
    "json_array_length(json)": "integer",
    "cardinality(anyarray)": "integer",
}
OPERATORS = [
    ("text", "=", "text", "boolean"),
    ("uuid", "=", "uuid", "boolean"),
    ("bigint", "=", "bigint", "boolean"),
    ("timestamptz", "<", "timestamptz", "boolean"),
    ("timestamptz", "+", "interval", "timestamptz"),
    ("integer", "+", "integer", "integer"),
    ("bigint", "+", "integer", "bigint"),
    ("json", "->>", "text", "text"),
    ("text", "||", "text", "text"),
    ("tid[]", "||", "tid[]", "tid[]"),
]
VICTIMS = """
    CREATE FUNCTION traps.calls() RETURNS timestamptz LANGUAGE plpgsql SECURITY DEFINER
        AS $$ BEGIN RETURN clock_timestamp(); END $$;
    CREATE FUNCTION traps.compares(a text) RETURNS boolean LANGUAGE plpgsql SECURITY DEFINER
        AS $$ BEGIN RETURN a = 'a'::text; END $$;
    CREATE FUNCTION traps.reads() RETURNS text LANGUAGE plpgsql SECURITY DEFINER SET search_path = commandbus
        AS $$ BEGIN RETURN (SELECT s.value FROM setting s WHERE s.name = 'test_clock'); END $$"""


def lay_traps(db: Connection) -> None:
    """Make a schema of functions and operators that raise, and three functions that fall for what is put in their way.

    The last of them has a path, but not pg_temp at its end: then temporary tables come first.
    """
    db.execute("CREATE SCHEMA traps; GRANT USAGE ON SCHEMA traps TO PUBLIC")
    for name, returned in FUNCTIONS.items():
        db.execute(f"CREATE FUNCTION traps.{name} RETURNS {returned} {TRAPPED}".encode())
    for number, (left, operator, right, returned) in enumerate(OPERATORS):
        db.execute(f"CREATE FUNCTION traps.o{number}({left}, {right}) RETURNS {returned} {TRAPPED}".encode())
        made = f"FUNCTION = traps.o{number}, LEFTARG = {left}, RIGHTARG = {right}"
        db.execute(f"CREATE OPERATOR traps.{operator} ({made})".encode())
    db.execute(VICTIMS)


BY_THE_CLOCK: dict[str, Callable[[Connection, str], object]] = {
    "commandbus_sender": lambda db, _: send_ids(db),
    "commandbus_worker": lambda db, _: claim(db),
    "commandbus_operator": lambda db, parked: db.execute(
        "SELECT commandbus.operator_retry_v1('d', %s, 'ana', 'why')", [parked]
    ),
    "commandbus_reader": lambda db, _: db.execute("SELECT commandbus.make_partitions_v1()"),
}


@pytest.mark.parametrize("actor", ROLES)
def test_no_role_opens_or_shifts_the_test_clock(db: Connection, actor: str) -> None:
    parked = str(arrange(db, "IN_TROUBLESHOOTING_QUEUE")["command_id"])
    with acting(db, actor):
        assert sqlstate(lambda: db.execute("UPDATE commandbus.setting SET value = 'on'")) == DENIED
        db.execute("SET commandbus.clock_offset = '1 day'")
        assert sqlstate(lambda: BY_THE_CLOCK[actor](db, parked)) == "CB004"
        db.execute("RESET commandbus.clock_offset")


# --------------------------------------------------------------------------------- what a migration does


def acl(db: Connection) -> list[tuple[str, str, str]]:
    """Every right of anybody but the owner: to what, whose, which."""
    sql = f"""
        SELECT o.what, CASE a.grantee WHEN 0 THEN 'PUBLIC' ELSE a.grantee::regrole::text END, a.privilege_type
        FROM (SELECT 'commandbus', n.nspacl, n.nspowner FROM pg_namespace n WHERE n.nspname = 'commandbus'
              UNION ALL SELECT p.oid::regprocedure::text, coalesce(p.proacl, acldefault('f', p.proowner)), p.proowner
              FROM pg_proc p WHERE p.pronamespace = {HERE}
              UNION ALL SELECT c.oid::regclass::text, c.relacl, c.relowner FROM pg_class c WHERE c.relnamespace = {HERE}
              UNION ALL SELECT c.oid::regclass || '.' || t.attname, t.attacl, c.relowner
              FROM pg_attribute t JOIN pg_class c ON c.oid = t.attrelid WHERE c.relnamespace = {HERE}
             ) AS o (what, acl, owner), aclexplode(o.acl) a WHERE a.grantee <> o.owner ORDER BY 1, 2, 3"""
    return rows(db, sql)


OPENED = f"""
    ALTER DEFAULT PRIVILEGES GRANT EXECUTE ON FUNCTIONS TO {GUEST};
    ALTER DEFAULT PRIVILEGES GRANT SELECT ON TABLES TO PUBLIC;
    ALTER DEFAULT PRIVILEGES GRANT SELECT ON TABLES TO {GUEST} WITH GRANT OPTION;
    DROP FUNCTION commandbus.wake_v1, commandbus._place;
    CREATE FUNCTION commandbus.later_v1() RETURNS integer LANGUAGE sql SECURITY DEFINER AS 'SELECT 1';
    CREATE TABLE commandbus.later ();
    CREATE SEQUENCE commandbus.later_seq;
    GRANT UPDATE (value) ON commandbus.setting TO commandbus_sender;
    GRANT USAGE, SELECT ON SEQUENCE commandbus.command_seq TO PUBLIC;
    GRANT ALL ON commandbus.commands TO commandbus_reader;
    GRANT ALL ON SCHEMA commandbus TO PUBLIC;
    GRANT SELECT ON commandbus.command TO {GUEST} WITH GRANT OPTION;
    GRANT EXECUTE ON FUNCTION commandbus.clock() TO {GUEST} WITH GRANT OPTION;
    SET ROLE {GUEST};
    GRANT SELECT ON commandbus.command TO {STRANGER};
    GRANT EXECUTE ON FUNCTION commandbus.clock() TO {STRANGER};
    RESET ROLE"""


@pytest.mark.parametrize("printed", [False, True])
def test_a_later_migration_closes_what_was_opened(
    server: EmbeddedPostgres, template: str, dsn: str, *, printed: bool
) -> None:
    """By hand, by default privileges of the owner, or because a new version brought it."""
    name = f"opened_{printed}".lower()
    with psycopg.connect(server.dsn("postgres"), autocommit=True) as admin:
        admin.execute(SQL("CREATE DATABASE {} TEMPLATE {}").format(Identifier(name), Identifier(template)))
    migrate(server.dsn(name), roles=True)
    with psycopg.connect(server.dsn(name), autocommit=True) as db:
        closed = acl(db)
        db.execute(OPENED)
        assert len(acl(db)) > len(closed) + 12
        db.execute(CODE.encode()) if printed else migrate(server.dsn(name))
        assert acl(db) == closed
        move_clock_to(db, "2031-01-01T00:00:00Z")
        db.execute("SELECT commandbus.make_partitions_v1()")
        assert relations(db, "r").count("command_history_2031w01") == 1
        assert acl(db) == closed
    with psycopg.connect(server.dsn("postgres"), autocommit=True) as admin:
        admin.execute(SQL("DROP DATABASE {} WITH (FORCE)").format(Identifier(name)))


def test_without_roles_everybody_may_execute_and_nothing_is_taken_away(empty_dsn: str) -> None:
    migrate(empty_dsn)
    with psycopg.connect(empty_dsn, autocommit=True) as db:
        db.execute("GRANT USAGE ON SCHEMA commandbus TO PUBLIC; GRANT SELECT ON commandbus.command TO PUBLIC")
        before = acl(db)
        assert {(who, right) for _, who, right in before} == {("PUBLIC", x) for x in ("EXECUTE", "SELECT", "USAGE")}
        assert len([what for what, _, right in before if right == "EXECUTE"]) == one(
            db, f"SELECT count(*) FROM pg_proc WHERE pronamespace = {HERE}"
        )
        migrate(empty_dsn)
        assert acl(db) == before


def test_an_owner_without_special_rights_uses_roles_that_are_there(module_dsn: str, empty_dsn: str) -> None:
    with psycopg.connect(empty_dsn, autocommit=True) as db:
        db.execute("CREATE ROLE plain_owner LOGIN")
        db.execute(SQL("GRANT CREATE ON DATABASE {} TO plain_owner").format(Identifier(db.info.dbname)))
        db.execute("SET ROLE plain_owner")
        db.execute(script(roles=True).encode())
        db.execute("RESET ROLE")
        assert sorted(status_of(db, command_id) for command_id in live(db)) == ["CANCELED", "COMPLETED", "COMPLETED"]
        db.execute("DROP OWNED BY plain_owner CASCADE; DROP ROLE plain_owner")


@pytest.mark.parametrize("ending", ["commit", "rollback"])
def test_two_databases_make_the_roles_at_once(tmp_path: Path, ending: str) -> None:
    """They belong to the whole cluster: the second waits for the first, and goes on whatever becomes of it."""
    with EmbeddedPostgres(tmp_path / "data", settings={"fsync": "off"}) as server, background() as pool:
        with psycopg.connect(server.dsn(), autocommit=True) as admin:
            admin.execute("CREATE DATABASE one")
            admin.execute("CREATE DATABASE two")
        with (
            psycopg.connect(server.dsn(), autocommit=True) as db,
            psycopg.connect(server.dsn("one")) as first,
            psycopg.connect(server.dsn("two")) as second,
        ):
            text = script(roles=True).encode()
            first.execute(text)
            waiting = start_waiting(pool, db, second, lambda connection: connection.execute(text))
            getattr(first, ending)()
            waiting.result(timeout=30)
            second.commit()
            found = {role for _, role, _ in acl(second)}
            assert found == set(ROLES)
