"""What an error of PostgreSQL or its driver means, and how it is told."""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Iterator
from functools import cache
from importlib.resources import files

import psycopg

from commandbus.errors import (
    BY_SQLSTATE,
    CommandBusError,
    DatabaseUnavailableError,
    InvalidCommandError,
    PermissionDeniedError,
    SchemaError,
)

_NO_SCHEMA = {"3F000", "42883", "42P01"}  # no such schema, function, table
_NO_RIGHT = "42501"
_TIME_IS_OVER = {"25P03", "25P04"}  # of a transaction: idle for too long, or too long; its session ends
_LOCK_TIMEOUT = "55P03"
_READ_ONLY = "25006"


def driver_error(error: BaseException) -> BaseException:
    """Return the driver's error inside those that SQLAlchemy and Django wrap around it."""
    found = error
    inner: BaseException | None = None if isinstance(error, CommandBusError) else error
    while inner is not None:
        if sqlstate(inner):
            found = inner
        inner = inner.__cause__
    return found


def sqlstate(error: BaseException) -> str:
    """Return what psycopg and asyncpg call `sqlstate`, and psycopg2 `pgcode`; empty if PostgreSQL said nothing."""
    return getattr(error, "sqlstate", None) or getattr(error, "pgcode", None) or ""


def _said(error: BaseException) -> tuple[str | None, str | None]:
    """Return PostgreSQL's message and hint. What else it says (DETAIL, CONTEXT) may quote the payload."""
    diag = getattr(error, "diag", None)
    if diag is not None:
        return diag.message_primary, diag.message_hint
    if sqlstate(error):  # asyncpg
        return getattr(error, "message", None), getattr(error, "hint", None)
    return None, None


def translate(error: BaseException) -> CommandBusError | None:
    """Return the library's error for what PostgreSQL said, if there is one."""
    error = driver_error(error)
    message, hint = _said(error)
    message = message or str(error)
    if isinstance(error, UnicodeEncodeError) or (isinstance(error, psycopg.DataError) and "NUL" in message):
        # Of our own parameters only names, words and filters are not ASCII. psycopg has refused them, not PostgreSQL.
        return InvalidCommandError("a NUL character or a lone surrogate cannot be sent to PostgreSQL: correct the text")
    if hint:
        message = f"{message}. {hint}"
    known = BY_SQLSTATE.get(sqlstate(error))
    if known is not None:
        return known(message)
    if sqlstate(error) in _NO_SCHEMA and "commandbus" in message:
        return SchemaError(f"{message}: run `commandbus migrate` on this database")
    if sqlstate(error) == _NO_RIGHT and (roles := _roles_for(message)):
        return PermissionDeniedError(f"{message}: ask the owner of the database for the role {' or '.join(roles)}")
    return None


@cache
def rights() -> dict[str, list[str]]:
    """Return the roles that may use each public function and view: the list in `sql/roles.sql`."""
    text = files("commandbus").joinpath("sql", "roles.sql").read_text("utf-8")
    listed = re.findall(r"^ +\('(\w+)', +'([\w, ]+)'\)", text, re.MULTILINE)
    return {name: [f"commandbus_{role}" for role in roles.split(", ")] for name, roles in listed}


def _roles_for(message: str) -> list[str]:
    """Return the roles that may do what PostgreSQL refuses here. Its message has another wording in each language."""
    words = re.findall(r"\w+", message)
    named = [roles for name, roles in rights().items() if name in words]
    # Without a right to the schema, it does not come to the function: any of the roles has that.
    return named[0] if named else rights()["schema_v1"] if "commandbus" in words else []


@contextlib.contextmanager
def translated() -> Iterator[None]:
    """Raise the library's errors for its SQLSTATEs, whatever wraps them; anything else passes as it is."""
    try:
        yield
    except Exception as error:
        if (ours := translate(error)) is None:
            raise
        raise ours from driver_error(error)  # what SQLAlchemy says quotes the payload


def brief(error: BaseException) -> str:
    """Return an error's first line for a log or a message: printable, not longer than 300, without data."""
    error = driver_error(error)
    line = (_said(error)[0] or str(error)).partition("\n")[0][:300]
    return printable(line)


def printable(text: str) -> str:
    """Return the text with its control characters escaped: they would steer a terminal or forge a line of a log."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def is_refusal(error: BaseException) -> bool:
    """Whether PostgreSQL refuses what a row says: data, constraint, limit, or a check of ours."""
    return sqlstate(driver_error(error))[:2] in {"22", "23", "54", "CB"}


def refusal(error: Exception, what: str) -> Exception:
    """Return what is told of a refusal: the library's own error, or `InvalidCommandError`."""
    if isinstance(error, CommandBusError):
        return error
    return InvalidCommandError(f"{what} was refused by PostgreSQL: {brief(error)}")


@contextlib.contextmanager
def refusals_of(what: str) -> Iterator[None]:
    """Tell a refusal by PostgreSQL as `InvalidCommandError`; its own words may quote the payload."""
    try:
        yield
    except CommandBusError:
        raise
    except Exception as error:
        if not is_refusal(error):
            raise
        raise refusal(error, what) from None


def is_connection_lost(error: BaseException) -> bool:
    """Whether the connection broke: what was under way may or may not have happened.

    An `InternalError` without a code is psycopg's: PgBouncer tells of a lost server twice, and two answers to a COMMIT
    are one too many for it.
    """
    if not isinstance(error, psycopg.OperationalError | psycopg.InterfaceError | psycopg.InternalError):
        return False
    state = error.sqlstate or "08"
    return state.startswith(("08", "57P")) or state in _TIME_IS_OVER


def is_unavailable(error: BaseException) -> bool:
    """Whether trying again later, on another connection, is what there is to do."""
    return is_short_of(error) or (isinstance(error, psycopg.OperationalError) and sqlstate(error)[:2] in {"40", "55"})


def is_short_of(error: BaseException) -> bool:
    """Whether the server lacks a connection, room, time or the right to write, whatever it was asked."""
    if isinstance(error, DatabaseUnavailableError) or is_connection_lost(error):
        return True
    state = sqlstate(error) if isinstance(error, psycopg.Error) else ""
    return state[:2] in {"53", "57", "58"} or state in {_LOCK_TIMEOUT, _READ_ONLY}


def own_copy(error: Exception) -> Exception:
    """Return an error for one more caller: one object raised in 50 places grows 50 frames of traceback."""
    return copy.copy(error).with_traceback(None)


def unavailable(error: psycopg.Error) -> DatabaseUnavailableError:
    """Return what is told when no connection can be made."""
    return DatabaseUnavailableError(f"no connection to PostgreSQL: {brief(error)}")
