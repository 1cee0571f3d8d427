"""The subcommand `doctor`: asks what `checks` lists, and looks for a pooler.

It only reads, in read-only transactions, and needs no more than the rights of a reader: with less it fails, because
nobody would look at what it cannot see.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Annotated, Any, TypeAlias

import psycopg
import typer

from commandbus._database import conninfo
from commandbus._failures import brief, unavailable
from commandbus.cli import terminal
from commandbus.cli.checks import CHECKS, Check, Level, Verdict, schema
from commandbus.cli.options import AsJson, Dsn

Connection: TypeAlias = psycopg.Connection[Any]

_CHECK_SECONDS = 5


def doctor(
    *,
    strict: Annotated[bool, typer.Option("--strict", help="A warning counts as a failure.")] = False,
    dsn: Dsn = None,
    as_json: AsJson = False,
) -> int:
    """Check the database, the queue and the workers, and say what to do; 1 if anything is a failure.

    It only reads, and the rights of a reader are enough for nearly all of it.
    """
    found = list(examine(conninfo(dsn, "commandbus doctor")))
    worst = max((verdict.level for _, verdict in found), key=list(Level).index)
    if as_json:
        terminal.print_json({"level": worst, "checks": [{"check": name, **of._asdict()} for name, of in found]})
    else:
        for name, verdict in found:
            terminal.print_entry([f"{verdict.level:7}", f"{name}: {verdict.found}"], [verdict.advice])
    return int(worst == Level.FAILURE or (strict and worst == Level.WARNING))


def examine(database: str) -> Iterator[tuple[str, Verdict]]:
    """Run all checks on connections that this string opens; yields their names and verdicts."""
    try:
        with contextlib.closing(_connect(database)) as first, contextlib.closing(_connect(database)) as second:
            for check in CHECKS:
                for verdict in _examine(check, first):
                    yield check.name, verdict if verdict.level != Level.OK else verdict._replace(advice=None)
            yield "pooler", pooler(first, second)
    except psycopg.OperationalError as error:
        raise unavailable(error) from None


def _connect(database: str) -> Connection:
    connection = psycopg.connect(database, prepare_threshold=None)  # a pooler may stand in between
    connection.read_only = True
    return connection


def _examine(check: Check, connection: Connection) -> list[Verdict]:
    try:
        with connection.transaction():
            connection.execute(f"SET LOCAL statement_timeout = '{_CHECK_SECONDS}s'".encode())
            rows = connection.execute(check.query.encode(), {"here": time.time()}).fetchall()
    except psycopg.errors.InsufficientPrivilege as error:
        if "commandbus.setting" in check.query:  # which is the owner's alone
            return [Verdict(Level.UNSEEN, brief(error), "ask the owner of the database, if you have to know")]
        return [Verdict(Level.FAILURE, brief(error), "connect as a role with the rights of commandbus_reader")]
    except (psycopg.errors.UndefinedTable, psycopg.errors.UndefinedFunction, psycopg.errors.InvalidSchemaName) as error:
        return [
            Verdict(Level.FAILURE if check.judge is schema else Level.UNSEEN, brief(error), "run `commandbus migrate`")
        ]
    except psycopg.errors.QueryCanceled:
        return [Verdict(Level.UNSEEN, f"the answer took longer than {_CHECK_SECONDS} s")]
    return [check.judge(*row) for row in rows] or [Verdict(Level.OK, check.nothing)]


def pooler(first: Connection, second: Connection) -> Verdict:
    """In transaction mode, two clients meet on one server process, or one client wanders over several.

    A pooler of any mode makes up the process id that libpq is told when it connects.
    """
    told = [connection.info.backend_pid for connection in (first, second)]
    pids = [_process(connection) for connection in (first, second, second, first)]
    if pids == [*told, *reversed(told)]:
        return Verdict(Level.OK, "none stands before the server")
    if pids[0] != pids[3] or pids[1] != pids[2] or pids[0] == pids[1]:
        advice = "open each bus with CommandBus(transaction_pooler=True), or with a DSN that leads past it"
        return Verdict(Level.OK, f"one in transaction mode stands before the server: {advice}")
    return Verdict(Level.OK, "one in session mode stands before the server")


def _process(connection: Connection) -> int:
    with connection.transaction():
        ((pid,),) = connection.execute("SELECT pg_backend_pid()").fetchall()
    return int(pid)
