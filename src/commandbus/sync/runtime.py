"""An event loop in a daemon thread, and the way of other threads to it.

A call goes through a queue of our own with one wake-up a burst: with 16 threads 57,000 calls/s, where
`run_coroutine_threadsafe` does 18,000 and anyio's portal 9,700.

Life: the thread starts at the first use. A fork leaves the child with a runtime that has not started; what it
inherited it neither uses nor closes, because that would break the parent's. At exit one hook ends all runtimes.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import contextvars
import inspect
import logging
import os
import sys
import threading
import warnings
import weakref
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine
from datetime import timedelta
from functools import partial
from types import TracebackType
from typing import Any, Self, TypeAlias, TypeVar, TypeVarTuple, overload

from commandbus.errors import ClosedError, ConfigurationError, SyncInAsyncError
from commandbus.sync.call import SETTLE_SECONDS, Call, wait

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

Closer: TypeAlias = Callable[[float], Awaitable[object]]

logger = logging.getLogger("commandbus.sync")

EXIT_SECONDS = 5.0
_POLICIES = ("raise", "warn", "allow")


class SyncRuntime:
    """Runs coroutines for threads that have no event loop. One may serve any number of buses and workers.

    `loop_factory`: makes the event loop, for instance `uvloop.new_event_loop`; default: a selector loop, also on
    Windows, because psycopg needs one. `on_async`: what happens to a call from a thread in which another event loop
    runs, and which the call would stop: "raise" `SyncInAsyncError`, "warn" or "allow"; default
    `$COMMAND_BUS_ON_ASYNC`, read now, else "raise", and "allow" in a notebook, where each cell runs under a loop.
    A call from the runtime's own loop would wait for itself, and always raises.
    """

    def __init__(
        self,
        *,
        loop_factory: Callable[[], asyncio.AbstractEventLoop] | None = None,
        on_async: str | None = None,
    ) -> None:
        self._loop_factory = loop_factory or asyncio.SelectorEventLoop
        self._on_async = _policy(on_async)
        self._foreign: asyncio.AbstractEventLoop | None = None
        self._closed = False
        self.generation = 0
        """Which process's, counted by forks: what was made in another is not to be used."""
        self._renew()
        _runtimes.add(self)

    @classmethod
    def of(cls, loop: asyncio.AbstractEventLoop) -> SyncRuntime:
        """Return a runtime on a loop that runs in another thread, and belongs to somebody else.

        It is not stopped by `shutdown` nor at exit, and after a fork it raises `ClosedError`.
        """
        runtime = cls()
        runtime._foreign = runtime._loop = loop
        return runtime

    def _renew(self) -> None:
        """Begin a life: nothing has started. The locks are new; in the child of a fork nobody may hold them."""
        self.opening = threading.RLock()
        """Held by who opens something on this runtime."""
        self._starting = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._queue: deque[tuple[Callable[[], object], Callable[[Exception], object]]] = deque()
        self._armed = False
        self._closers: list[Closer] = []
        self._calls: set[Call] = set()
        self._winding_up = False

    # -- calling -------------------------------------------------------------------------------------------------------

    @overload
    def run(self, function: Coroutine[Any, Any, T], /, *, timeout: float | timedelta | None = None) -> T: ...

    @overload
    def run(
        self,
        function: Callable[[*Ts], Coroutine[Any, Any, T]],
        /,
        *args: *Ts,
        timeout: float | timedelta | None = None,
    ) -> T: ...

    def run(  # type: ignore[misc] # mypy does not match *args with a TypeVarTuple
        self, function: Any, /, *args: Any, timeout: float | timedelta | None = None
    ) -> Any:
        """Run an async function with these arguments, or a coroutine, on the loop; return its result in this thread.

        It runs in a copy of this thread's context, and its exceptions are raised here. After `timeout` (seconds, or a
        timedelta) it is cancelled, and so it is on Ctrl-C and the like; its end is awaited, for up to 5 s, before
        `TimeoutError` or that exception goes on. What came to its end in the moment of the timeout is returned.

        Raises `SyncInAsyncError`, before the coroutine exists if it is given the function, and `ClosedError` after
        `shutdown`.
        """
        return self.join(self._call(function, *args), timeout)

    def begin(self, call: Call) -> Call:
        """Start a call, and do not wait: `join` waits. Who calls this has asked `check`."""
        call.submitted = True
        self.start()
        self.submit(partial(call.start, self._calls), call.fail)
        return call

    def join(self, call: Call, timeout: float | timedelta | None = None) -> Any:  # noqa: ANN401 - whatever it returned
        """Start a call unless it was, wait for it and return its result; see `run`. Several threads may join one."""
        seconds = timeout.total_seconds() if isinstance(timeout, timedelta) else timeout
        try:
            if not call.submitted:  # in here, so that no moment is left in which Ctrl-C would let it run on
                self.begin(call)
            if not wait(call.ended, seconds):
                self.abandon(call)
                call.expire(f"the call did not end within {seconds} s: it was cancelled")
            return call.outcome()
        except BaseException as interruption:
            if not call.done:
                self.abandon(call)
            if interruption is not call.error:
                call.explain(interruption)
            raise
        finally:
            del call  # a cycle of exception, traceback and frame would keep the caller's locals alive

    def _call(self, function: Any, /, *args: Any) -> Call:  # noqa: ANN401 - as `run` takes it
        given = inspect.iscoroutine(function)
        try:
            self.check(getattr(function, "__qualname__", "the async function"))
            self.start()
        except BaseException:
            if given:
                function.close()
            raise
        return Call(function if given else partial(function, *args))

    def abandon(self, call: Call) -> None:
        """Cancel a call, and await its end, bounded."""
        self.submit(call.cancel, call.fail)
        wait(call.ended, SETTLE_SECONDS)

    def check(self, name: str) -> None:
        """Raise, or warn of, a call from a thread in which an event loop runs. `name`: what to await there."""
        running = asyncio._get_running_loop()  # 45 ns; get_running_loop() raises instead, 311 ns
        if running is None:
            return
        if running is self._loop:
            # Under gevent all threads are one to asyncio: only the thread's own identity tells them apart.
            if self._thread is not None and self._thread.ident != threading.get_ident():
                return
            raise SyncInAsyncError(
                f"a blocking call on the event loop that has to carry it out would wait for itself: `await {name}`"
            )
        if self._on_async == "raise":
            raise SyncInAsyncError(
                f"a blocking call would stop the event loop of this thread: `await {name}` there, or give SyncRuntime "
                'on_async="warn" or "allow"'
            )
        if self._on_async == "warn":
            warnings.warn(
                f"a blocking call stops the event loop of this thread: `await {name}` there",
                RuntimeWarning,
                stacklevel=_level_of_caller(),
            )

    def submit(self, function: Callable[[], object], refuse: Callable[[Exception], object]) -> None:
        """Call this on the loop, soon. `refuse` is called with a `ClosedError` instead when there is no loop any more.

        Neither may raise. Calls are made in order; many at once cost one wake-up.
        """
        self._queue.append((function, refuse))
        loop = self._loop
        if not self._armed and loop is not None:
            try:
                self._armed = True
                loop.call_soon_threadsafe(self._drain, context=contextvars.Context())
            except RuntimeError:  # the loop is closed
                self._refuse_all()
            except BaseException:  # Ctrl-C in the midst of it
                self._armed = False
                raise
        elif loop is None or loop.is_closed():
            self._refuse_all()

    def _drain(self) -> None:
        self._armed = False  # before taking anything: the worst is a wake-up too many
        for _ in range(len(self._queue)):
            function, _ = self._queue.popleft()
            function()

    def _refuse_all(self) -> None:
        """Refuse what is in the queue, if the loop is closed; who puts something there later sees that as well."""
        if self._loop is None or self._loop.is_closed():
            with contextlib.suppress(IndexError):
                while True:
                    _, refuse = self._queue.popleft()
                    refuse(ClosedError("the runtime was shut down"))

    @property
    def is_here(self) -> bool:
        """Whether this is the thread of its loop, which must not wait for what runs there."""
        return asyncio._get_running_loop() is self._loop is not None

    @property
    def closed(self) -> bool:
        """Whether it was shut down, or belongs to the process before a fork."""
        return self._closed

    # -- living --------------------------------------------------------------------------------------------------------

    def start(self) -> asyncio.AbstractEventLoop:
        """Return the loop; it is started if it does not run yet. Raises `ClosedError`."""
        if self._closed:
            raise ClosedError("the runtime was shut down, or belongs to the process before the fork: make a new one")
        if _ending:
            raise ClosedError("the interpreter ends: nobody would shut this runtime down")
        if self._loop is not None:
            return self._loop
        with self._starting:
            if self._loop is None:
                loop = self._loop_factory()
                thread = threading.Thread(target=self._serve, args=(loop,), name="commandbus-sync", daemon=True)
                self._thread = thread
                try:
                    thread.start()
                except RuntimeError as error:  # the interpreter is ending
                    loop.close()
                    raise ClosedError(f"the runtime cannot start: {error}") from None
                except BaseException:  # Ctrl-C while it waited for the thread, which is there
                    loop.call_soon_threadsafe(loop.stop)
                    raise
                self._loop = loop
            return self._loop

    def _serve(self, loop: asyncio.AbstractEventLoop) -> None:
        try:
            loop.run_forever()
        finally:
            loop.close()
            self._refuse_all()
            for call in self._calls:  # that could not be cancelled
                call.fail(ClosedError("the runtime was shut down"))

    def adopt(self, close: Closer) -> None:
        """Call this at the shutdown, with the seconds that are left, and await it; the last adopted first."""
        self._closers.append(close)

    def disown(self, close: Closer) -> None:
        """Forget what was adopted."""
        with contextlib.suppress(ValueError):
            self._closers.remove(close)

    def shutdown(self, timeout: float = EXIT_SECONDS) -> None:
        """Stop the workers and close the buses of this runtime, cancel what else runs, and end its thread.

        Takes up to `timeout` seconds, in which the handlers of the workers may still use the buses. Calls that wait at
        the end raise `ClosedError`. Shutting down twice is allowed.
        """
        if self.is_here:
            raise SyncInAsyncError("a runtime cannot be shut down from its own loop")
        with self._starting:
            loop, thread = self._loop, self._thread
            first, self._winding_up = not self._winding_up, True
            self._closed = self._closed or loop is None
        if loop is None:
            return
        if thread is None:  # it is somebody else's
            if first and loop.is_running():
                call = Call(partial(self._close_all, loop, timeout))
                self.submit(partial(call.start, self._calls), call.fail)
                wait(call.ended, timeout + 1)
        else:
            if first:
                loop.call_soon_threadsafe(lambda: loop.create_task(self._wind_up(loop, timeout)))
            thread.join(timeout + 1)
            if thread.is_alive():
                logger.warning("the event loop of commandbus.sync is stuck, and is left behind")
        self._closed = True

    async def _wind_up(self, loop: asyncio.AbstractEventLoop, timeout: float) -> None:
        await self._close_all(loop, timeout)
        self._closed = True  # not before: while the workers end, their handlers may send
        tasks = asyncio.all_tasks(loop) - {asyncio.current_task(loop)}
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=1)
        await loop.shutdown_asyncgens()
        with contextlib.suppress(RuntimeError):  # at exit no thread can be started to wait for those
            await loop.shutdown_default_executor()
        loop.stop()

    async def _close_all(self, loop: asyncio.AbstractEventLoop, timeout: float) -> None:
        end = loop.time() + timeout
        try:
            async with asyncio.timeout(timeout):
                while self._closers:
                    await self._close_one(self._closers.pop(), end - loop.time())
        except TimeoutError:
            logger.warning("not everything was closed within %.0f s", timeout)

    async def _close_one(self, close: Closer, seconds: float) -> None:
        try:
            await close(seconds)
        except Exception:
            logger.exception("something could not be closed; the rest goes on")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.shutdown()

    def after_fork(self) -> None:
        """Start anew in the child of a fork."""
        if self._loop is not None:
            _inherited.append((self._loop, self._thread, self._queue, self._closers))
        self.generation += 1
        self._closed = self._closed or self._foreign is not None
        self._renew()


def _policy(given: str | None) -> str:
    chosen = given or os.environ.get("COMMAND_BUS_ON_ASYNC") or ("allow" if _in_notebook() else "raise")
    if chosen not in _POLICIES:
        what = "on_async" if given else "COMMAND_BUS_ON_ASYNC"
        raise ConfigurationError(f"{what} is {chosen!r}: it must be one of {', '.join(_POLICIES)}")
    return chosen


def _in_notebook() -> bool:
    get_shell = getattr(sys.modules.get("IPython"), "get_ipython", None)
    return get_shell is not None and hasattr(get_shell(), "kernel")


def _level_of_caller() -> int:
    """Return the `stacklevel` for `check` at which the line stands that called the library."""
    level, frame = 0, sys._getframe(1)
    while frame.f_globals["__name__"].startswith("commandbus.") and frame.f_back is not None:
        level, frame = level + 1, frame.f_back
    return level + 1


# -- all runtimes of the process ---------------------------------------------------------------------------------------

_runtimes: weakref.WeakSet[SyncRuntime] = weakref.WeakSet()
_inherited: list[object] = []
"""What the parent of a fork has open: never used, closed or collected here."""


_ending: list[bool] = []
"""Not empty once the hook at exit has run."""


def _after_fork() -> None:
    for runtime in list(_runtimes):
        runtime.after_fork()


def _shut_down_all() -> None:
    logging.getLogger("commandbus").addHandler(logging.NullHandler())  # where no log is kept, it ends without a word
    _ending.append(True)
    for runtime in list(_runtimes):
        runtime.shutdown()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_after_fork)
atexit.register(_shut_down_all)
