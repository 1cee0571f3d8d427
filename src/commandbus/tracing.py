"""Carries the trace context of a sender to the handler, in the command's headers.

The library knows only this hook. `OpenTelemetryTracing` (extra `opentelemetry`) puts `traceparent` there, as the W3C
Trace Context recommendation says, and lets the handler run under it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Protocol


class Tracing(Protocol):
    """What a bus calls; write your own in a few lines."""

    def inject(self, headers: dict[str, str]) -> None:
        """Write the current trace context into the headers of a command. Called in the sender's own context."""

    def activate(self, headers: Mapping[str, str]) -> AbstractContextManager[object]:
        """Return a context manager under which the handler of a command with these headers runs."""


class NoTracing:
    """The default: carries nothing of its own; headers that the sender gave travel anyway."""

    def inject(self, headers: dict[str, str]) -> None:
        """Leave the headers as they are."""

    def activate(self, headers: Mapping[str, str]) -> AbstractContextManager[object]:
        """Do nothing."""
        del headers
        return contextlib.nullcontext()


class OpenTelemetryTracing:
    """Uses the globally configured propagator of OpenTelemetry; a W3C `traceparent` by default."""

    def __init__(self) -> None:
        from opentelemetry import context, propagate  # noqa: PLC0415 - an extra

        self._context = context
        self._propagate = propagate

    def inject(self, headers: dict[str, str]) -> None:
        """Write `traceparent`, and whatever else the propagator carries."""
        self._propagate.inject(headers)

    @contextlib.contextmanager
    def activate(self, headers: Mapping[str, str]) -> Iterator[None]:
        """Make the sender's context the current one."""
        token = self._context.attach(self._propagate.extract(dict(headers)))
        try:
            yield
        finally:
            self._context.detach(token)
