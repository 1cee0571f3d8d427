"""Middleware around a `def` handler, in its own thread: what frameworks want to be told there.

One of your own is a context manager that is called with the command and the handler's context:

    @contextmanager
    def timed(command, context):
        started = time.monotonic()
        yield
        print(command.command_type, time.monotonic() - started)

    SyncWorker(bus, "payments", registry, middleware=[timed])
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any, Protocol

from commandbus.handlers import Middleware
from commandbus.model import Command


class _ScopedSession(Protocol):
    def remove(self) -> object: ...


@contextlib.contextmanager
def django_connections(command: Command, context: object) -> Iterator[None]:
    """Close Django's stale connections before and after each handler, as Django does around each request.

    Without it a handler's thread keeps a connection that the server has long closed, and fails with it.
    """
    del command, context
    db: Any = sys.modules["django.db"]  # a program with connections of Django has imported it
    db.close_old_connections()
    try:
        yield
    finally:
        db.reset_queries()
        db.close_old_connections()


def scoped_session(session: _ScopedSession) -> Middleware:
    """Remove SQLAlchemy's `scoped_session` of the thread after each handler, and with it what a handler left open."""

    @contextlib.contextmanager
    def around(command: Command, context: object) -> Iterator[None]:
        del command, context
        try:
            yield
        finally:
            session.remove()

    return around
