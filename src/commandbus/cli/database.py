"""How a subcommand reaches the database, and how it is stopped."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Awaitable, Callable, Iterator
from typing import TypeVar

from commandbus.bus import CommandBus
from commandbus.errors import CommandBusError

T = TypeVar("T")


class StoppedError(CommandBusError):
    """Ctrl-C came; the message says what is known of a call that was under way."""

    def __init__(self, what_is_known: str = "") -> None:
        super().__init__(f"interrupted: {what_is_known}" if what_is_known else "interrupted")


def ask(dsn: str | None, work: Callable[[CommandBus], Awaitable[T]]) -> T:
    """Do this on a bus of its own."""
    try:
        return asyncio.run(on_bus(dsn, work, "commandbus cli"))
    except KeyboardInterrupt as interrupt:
        notes = getattr(interrupt.__context__, "__notes__", ())  # of the CancelledError: what is known of a send
        raise StoppedError("; ".join(notes) or "what was under way may have happened") from None


async def on_bus(dsn: str | None, work: Callable[[CommandBus], Awaitable[T]], application_name: str) -> T:
    """Open a bus, do this on it, close it."""
    async with CommandBus(dsn, application_name=application_name) as bus:
        return await work(bus)


@contextlib.contextmanager
def until_stopped() -> Iterator[None]:
    """Let SIGTERM do what Ctrl-C does, and take either as the wish to end well."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with contextlib.suppress(KeyboardInterrupt):
        yield
