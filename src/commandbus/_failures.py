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
    if error.sqlstate == _NO_RIGHT and (roles := _roles_for(message)):
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
    """Whether the connection broke: what was under way may or may not have happened."""
    if not isinstance(error, psycopg.OperationalError | psycopg.InterfaceError):
        return False
    state = error.sqlstate or "08"
    return state.startswith(("08", "57P")) or state == "25P03"


def is_unavailable(error: BaseException) -> bool:
    """Whether trying again later, on another connection, is what there is to do."""
    return isinstance(error, DatabaseUnavailableError) or (
        isinstance(error, psycopg.OperationalError | psycopg.InterfaceError)
        and (is_connection_lost(error) or (error.sqlstate or "")[:2] in {"40", "53", "55", "57", "58"})
    )


def own_copy(error: Exception) -> Exception:
    """Return an error for one more caller: one object raised in 50 places grows 50 frames of traceback."""
    return copy.copy(error).with_traceback(None)


def unavailable(error: psycopg.Error) -> DatabaseUnavailableError:
    """Return what is told when no connection can be made."""
    return DatabaseUnavailableError(f"no connection to PostgreSQL: {brief(error)}")
