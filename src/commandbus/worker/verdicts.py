"""What a delivery ends with, and what the log says of it; the same for both kinds of handler."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager

import psycopg

from commandbus._failures import brief, is_connection_lost, is_short_of, printable
from commandbus.errors import DatabaseUnavailableError, LeaseLostError, TransientCommandError
from commandbus.model import Command, Json
from commandbus.tracing import NoTracing, Tracing
from commandbus.worker.endings import Completed, Ending, Failed, Recorded, Released, code_of, completed, failed
from commandbus.worker.leases import Lease

logger = logging.getLogger("commandbus.worker")

_UNTRACED = contextlib.nullcontext()


class TimedOutCommandError(TransientCommandError):
    """The handler's timeout is over."""

    def __init__(self, lease: Lease) -> None:
        super().__init__("TIMEOUT", f"the handler exceeded its timeout of {lease.handler.timeout}")


class Verdicts:
    """Turns what a handler returned or raised into an ending. Any thread may ask."""

    def __init__(self, worker: str, tracing: Tracing) -> None:
        self._worker = worker
        # 2 us a command, a tenth of all that the worker's own Python costs, for a hook that does nothing.
        self._tracing = None if isinstance(tracing, NoTracing) else tracing

    def completed(self, result: Json, lease: Lease) -> Completed:
        """Return the ending of a handler that returned this."""
        ending = completed(result)
        if ending.replaced:
            logger.warning(
                "the result breaks a limit: what is recorded in its place says which",
                extra=lease.log_extra(self._worker),
            )
        return ending

    def failed(self, error: BaseException, lease: Lease) -> Failed:
        """Return the ending of a handler that raised this, and log what follows from it.

        The message stays with the command: it may quote the payload.
        """
        attempt, limit = lease.claimed.attempts + 1, lease.claimed.max_attempts or lease.handler.retry.max_attempts
        ending = failed(error, lease.handler, attempt)
        match ending.kind:
            case "BUSINESS":
                level, then = logging.INFO, "it ends as FAILED"
            case "TRANSIENT" if attempt < limit:
                level, then = logging.WARNING, f"again in {ending.retry_in.total_seconds():.1f} s"
            case _:
                level, then = logging.ERROR, "it is parked in the troubleshooting queue"
        logger.log(
            level,
            "attempt %d failed with %s: %s",
            attempt,
            printable(code_of(error)),
            then,
            extra=lease.log_extra(self._worker),
        )
        return ending

    def raised(self, error: BaseException, lease: Lease) -> Ending:
        """Return the ending of a handler that raised this, perhaps out of its transaction.

        When the connection breaks at the end of that, the outcome is unknown and the lease is released: the fence lets
        that pass only if nothing was committed. So it is when the server cannot do, before and after the handler, what
        is the library's own: that is not the handler's failure.
        """
        if not lease.handler.transactional:
            return self.failed(error, lease)
        if isinstance(error, LeaseLostError) and lease.completing:
            logger.warning(
                "the lease was lost; the handler's transaction is rolled back", extra=lease.log_extra(self._worker)
            )
            return Recorded()
        if isinstance(error, psycopg.Error | DatabaseUnavailableError | TimedOutCommandError):
            unknown = lease.completing and is_connection_lost(error)
            not_its_doing = not lease.charged and (is_short_of(error) or isinstance(error, TimedOutCommandError))
            if unknown or not_its_doing:
                logger.warning(
                    "the handler's transaction is rolled back and released: %s",
                    brief(error),
                    extra=lease.log_extra(self._worker),
                )
                return Released()
        return self.failed(error, lease)

    def under_trace(self, command: Command, lease: Lease) -> AbstractContextManager[None]:
        """Make the sender's trace context current. A hook that fails, or eats exceptions, changes no ending."""
        return _UNTRACED if self._tracing is None else self._under(self._tracing, command, lease)

    @contextlib.contextmanager
    def _under(self, tracing: Tracing, command: Command, lease: Lease) -> Iterator[None]:
        trace = None
        try:
            trace = tracing.activate(command.headers)
            trace.__enter__()
        except Exception:
            logger.exception("the tracing hook failed", extra=lease.log_extra(self._worker))
            trace = None
        try:
            yield
        finally:
            try:
                if trace is not None:
                    trace.__exit__(None, None, None)
            except Exception:
                logger.exception("the tracing hook failed", extra=lease.log_extra(self._worker))
