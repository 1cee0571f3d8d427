"""What an error of PostgreSQL or its driver means, and how it is told."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator

import psycopg

from commandbus.errors import (
    BY_SQLSTATE,
    CommandBusError,
    DatabaseUnavailableError,
    InvalidCommandError,
    SchemaError,
)

_NO_SCHEMA = {"3F000", "42883", "42P01"}  # no such schema, function, table


def translate(error: psycopg.Error) -> CommandBusError | None:
    """Return the library's error for what PostgreSQL said, if there is one."""
    message = error.diag.message_primary or str(error)
    if error.diag.message_hint:
        message = f"{message}. {error.diag.message_hint}"
    known = BY_SQLSTATE.get(error.sqlstate or "")
    if known is not None:
        return known(message)
    if error.sqlstate in _NO_SCHEMA and "commandbus" in message:
        return SchemaError(f"{message}: run `commandbus migrate` on this database")
    return None


def brief(error: BaseException) -> str:
    """Return an error's first line for a log or a message: printable, not longer than 300, without data.

    What else PostgreSQL says (DETAIL, CONTEXT) may quote the payload.
    """
    text = error.diag.message_primary if isinstance(error, psycopg.Error) else None
    line = (text or str(error)).partition("\n")[0][:300]
    return printable(line)


def printable(text: str) -> str:
    """Return the text with its control characters escaped: they would steer a terminal or forge a line of a log."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def is_refusal(error: BaseException) -> bool:
    """Whether PostgreSQL refuses what a row says: data, constraint, limit, or a check of ours."""
    return (getattr(error, "sqlstate", None) or "")[:2] in {"22", "23", "54", "CB"}


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
    except psycopg.Error as error:
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
    return state.startswith(("08", "57P")) or state == "25P03"


def is_unavailable(error: BaseException) -> bool:
    """Whether trying again later, on another connection, is what there is to do."""
    if isinstance(error, DatabaseUnavailableError) or is_connection_lost(error):
        return True
    return isinstance(error, psycopg.OperationalError) and (error.sqlstate or "")[:2] in {"40", "53", "55", "57", "58"}


def own_copy(error: Exception) -> Exception:
    """Return an error for one more caller: one object raised in 50 places grows 50 frames of traceback."""
    return copy.copy(error).with_traceback(None)


def unavailable(error: psycopg.Error) -> DatabaseUnavailableError:
    """Return what is told when no connection can be made."""
    return DatabaseUnavailableError(f"no connection to PostgreSQL: {brief(error)}")
