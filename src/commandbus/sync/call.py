"""One call from a thread to the event loop of a runtime."""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import sys
import threading
import time
from collections.abc import Callable, Coroutine
from typing import Any

from commandbus.errors import ClosedError

SETTLE_SECONDS = 5.0
"""How long a caller that gave up waits for the end of what it has cancelled."""

_SLICE_SECONDS = 1.0 if sys.platform != "win32" else 0.1
"""How long a wait may be deaf to signals. One that comes just as the lock is being waited for, or that another thread
is given, does not interrupt it: under load, 1 of 15 workers slept through its first SIGTERM. On Windows none does
before Python 3.14."""


class Call:
    """One call: made in a thread, carried out on the loop."""

    __slots__ = ("_context", "_given", "_task", "done", "ended", "error", "result", "submitted")

    def __init__(self, given: Coroutine[Any, Any, Any] | Callable[[], Coroutine[Any, Any, Any]]) -> None:
        self._given = given
        self._context = contextvars.copy_context()
        self._task: asyncio.Task[None] | None = None
        self.submitted = False
        self.done = False
        self.result: Any = None
        self.error: BaseException | None = None
        self.ended = threading.Lock()
        self.ended.acquire()

    def start(self, running: set[Call]) -> None:
        """Begin, on the loop, and be one of these until it has ended."""
        if self.done:  # the caller has given up long ago
            self._drop()
            return
        self._task = asyncio.get_running_loop().create_task(self._carry_out(), context=self._context)
        self._task.add_done_callback(lambda _: self._leave(running))
        running.add(self)

    def _leave(self, running: set[Call]) -> None:
        running.discard(self)
        self.fail(asyncio.CancelledError())  # no news, unless it was cancelled before its first step

    async def _carry_out(self) -> None:
        try:
            self._end(await (self._given() if callable(self._given) else self._given), None)
        except BaseException as error:  # noqa: BLE001 - all of it is the caller's
            below = error.__traceback__ and error.__traceback__.tb_next  # this frame holds what holds the exception
            self._end(None, error.with_traceback(below))

    def _end(self, result: object, error: BaseException | None) -> None:
        if not self.done:
            self.result, self.error, self.done = result, error, True
            self._task = None
            self.ended.release()

    def _drop(self) -> None:
        """Close a coroutine that will never be awaited: Python would warn of it."""
        if inspect.iscoroutine(self._given) and inspect.getcoroutinestate(self._given) == inspect.CORO_CREATED:
            self._given.close()

    def cancel(self) -> None:
        """Cancel, on the loop."""
        if self._task is not None:
            self._task.cancel()
        else:
            self.fail(asyncio.CancelledError())

    def fail(self, error: BaseException) -> None:
        """End it with this error, unless it has ended; nothing of it runs any more."""
        self._end(None, error)
        self._drop()

    def expire(self, message: str) -> None:
        """Make a call that was cancelled because it took too long raise `TimeoutError`, unless it has ended."""
        if not self.done or isinstance(self.error, asyncio.CancelledError):
            late = TimeoutError(message)
            self.explain(late)
            if self.done:
                self.error = late
            else:
                self._end(None, late)

    async def wait(self) -> None:
        """Wait on the loop until it has ended."""
        if self._task is not None:
            await asyncio.wait([self._task])

    def outcome(self) -> Any:  # noqa: ANN401 - whatever it returned
        """Return the result, or raise the exception."""
        if self.error is None:
            return self.result
        try:
            if isinstance(self.error, asyncio.CancelledError):
                raise ClosedError("the call was cancelled: its runtime was shut down") from None
            raise self.error
        finally:
            del self  # no cycle of exception, traceback and frame keeps the caller's locals alive

    def explain(self, interruption: BaseException) -> None:
        """Tell on the caller's exception how the call ended, or what it has said of itself when it was cancelled."""
        if self.done and self.error is None:
            interruption.add_note("the call had succeeded before that; its result is lost")
        for note in getattr(self.error, "__notes__", ()):
            interruption.add_note(note)


def wait(gate: threading.Lock, timeout: float | None) -> bool:
    """Wait until another thread has released the gate, and leave it open; Ctrl-C comes through."""
    end = None if timeout is None else time.monotonic() + timeout
    opened = False
    while not opened and (end is None or end > time.monotonic()):
        left = _SLICE_SECONDS if end is None else max(0.0, end - time.monotonic())
        opened = gate.acquire(timeout=min(_SLICE_SECONDS, left))
    if opened:
        gate.release()
    return opened
