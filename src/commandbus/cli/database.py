"""How a subcommand reaches the database, and how it is stopped."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Awaitable, Callable, Iterator
from typing import TypeVar

import psycopg
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from commandbus.bus import CommandBus
from commandbus.errors import CommandBusError, ConfigurationError, DatabaseUnavailableError

T = TypeVar("T")


class StoppedError(CommandBusError):
    """Ctrl-C came; the message says what is known of a call that was under way."""

    def __init__(self, what_is_known: str = "") -> None:
        super().__init__(f"interrupted: {what_is_known}" if what_is_known else "interrupted")


def ask(dsn: str | None, work: Callable[[CommandBus], Awaitable[T]]) -> T:
    """Do this on a bus of its own. Looks first whether the database answers: the pool would try for 10 s."""
    dsn = reachable(dsn)
    try:
        return asyncio.run(on_bus(dsn, work, "commandbus cli"))
    except KeyboardInterrupt as interrupt:
        notes = getattr(interrupt.__context__, "__notes__", ())  # of the CancelledError: what is known of a send
        raise StoppedError("; ".join(notes) or "what was under way may have happened") from None


async def on_bus(dsn: str, work: Callable[[CommandBus], Awaitable[T]], application_name: str) -> T:
    """Open a bus, do this on it, close it."""
    async with CommandBus(dsn, application_name=application_name) as bus:
        return await work(bus)


def valid(dsn: str | None) -> str:
    """Return the DSN if it can be one; says nothing of what is in it, which may be a password."""
    if not dsn:
        raise ConfigurationError("no DSN: set COMMAND_BUS_DSN, or give --dsn")
    try:
        parts = conninfo_to_dict(dsn)
    except psycopg.ProgrammingError:
        raise ConfigurationError("the DSN is not a PostgreSQL connection string") from None
    # libpq cuts a URI at the first of these, and would name the rest of the password as a host, a port or a database.
    cut = any("@" in str(parts.get(part, "")) for part in ("host", "port", "dbname"))
    if cut or not all(port.isdecimal() or not port for port in str(parts.get("port", "")).split(",")):
        raise ConfigurationError("the DSN cannot be right: write % @ / in a password as %25 %40 %2F")
    return dsn


def reachable(dsn: str | None) -> str:
    """Return the DSN if a database answers there. Raises `DatabaseUnavailableError` that says why none does."""
    dsn = valid(dsn)
    defaults = {"connect_timeout": "10", "application_name": "commandbus cli"}
    try:
        psycopg.connect(make_conninfo("", **(defaults | conninfo_to_dict(dsn)))).close()
    except psycopg.OperationalError as error:
        raise DatabaseUnavailableError(str(error)) from None
    return dsn


@contextlib.contextmanager
def until_stopped() -> Iterator[None]:
    """Let SIGTERM do what Ctrl-C does, and take either as the wish to end well."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with contextlib.suppress(KeyboardInterrupt):
        yield
