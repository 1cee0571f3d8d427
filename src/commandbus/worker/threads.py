"""Threads for plain `def` handlers.

Not a ThreadPoolExecutor: the interpreter joins its threads at exit, so that one hung handler keeps the process from
ending (6.08 s against 0.04 s). These are daemons.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Collection, Iterator
from math import inf
from typing import Any, TypeAlias, TypeVar
from uuid import UUID

from commandbus.errors import ConfigurationError
from commandbus.model import StuckHandler
from commandbus.worker.leases import Lease

T = TypeVar("T")
Work: TypeAlias = tuple[float, Lease, Callable[[Lease], Any], Callable[[Lease, Any], None]]

_WORK, _END = True, False


def pool_size(given: int | None) -> int:
    """Return the number of threads: as given, else `$COMMAND_BUS_SYNC_THREADS`, else `min(32, os.cpu_count() or 1)`."""
    if given is not None:
        if given < 1:
            raise ConfigurationError(f"thread_pool_size is {given}: it must be at least 1")
        return given
    text = os.environ.get("COMMAND_BUS_SYNC_THREADS")
    if text is None:
        return min(32, os.cpu_count() or 1)
    if not text.strip().isdecimal() or int(text) < 1:
        raise ConfigurationError(f"COMMAND_BUS_SYNC_THREADS is {text!r}: it must be a whole number of at least 1")
    return int(text)


logger = logging.getLogger("commandbus.worker")

_here = threading.local()  # `threads`: whose thread this is


def waiting_here(domain: str, command_id: UUID) -> contextlib.AbstractContextManager[None]:
    """Say that this thread waits for this command, within the block; a handler's thread runs nothing else meanwhile."""
    threads: HandlerThreads | None = getattr(_here, "threads", None)
    return contextlib.nullcontext() if threads is None else threads.waiting(domain, command_id)


class HandlerThreads:
    """Up to `size` threads that run what they are given, first in, first out; started as they are needed.

    One token wakes one thread, and a thread that takes work while more is there wakes the next one. So a burst of
    handlers that take no time is run by few threads, without a switch of the interpreter lock for each.
    """

    def __init__(self, name: str, size: int, domains: Collection[str]) -> None:
        self._name = name
        self.size = size
        self._domains = domains
        self._awaited: dict[int, tuple[str, UUID]] = {}  # by the identity of the thread that waits for it
        self._work: deque[Work] = deque()
        self._tokens: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._running: dict[int, Lease] = {}  # by the identity of the thread

    def submit(
        self, leases: list[Lease], run: Callable[[Lease], T], then: Callable[[Lease, T], None], *, unfinished: int
    ) -> bool:
        """Run each of these in a thread, and then `then` there, when the thread is free again; neither may raise.

        `unfinished`: how many were submitted and not told of, these included. False: there is no thread, and none can
        be started; call it again.
        """
        now = time.monotonic()
        self._work.extend([(now, lease, run, then) for lease in leases])
        while len(self._threads) < min(self.size, unfinished):
            number = len(self._threads) + 1
            thread = threading.Thread(target=self._serve, name=f"{self._name}-{number}", daemon=True)
            try:
                thread.start()
            except RuntimeError:  # the limit of processes or of memory
                break
            self._threads.append(thread)
        self._wake()
        return bool(self._threads)

    def withdraw(self, before: float = inf) -> list[Lease]:
        """Take back what no thread has begun with, of what was submitted before; one more when a thread is quicker."""
        found = []
        with contextlib.suppress(IndexError):
            while self._work[0][0] <= before:
                found.append(self._work.popleft()[1])
        return found

    def close(self) -> None:
        """Let the idle threads end; a busy one ends after its work."""
        for _ in self._threads:
            self._tokens.put(_END)

    @contextlib.contextmanager
    def waiting(self, domain: str, command_id: UUID) -> Iterator[None]:
        """Warn if with this one all threads wait for commands of the domains that this worker works for."""
        ident = threading.get_ident()
        self._awaited[ident] = domain, command_id
        try:
            awaited = list(self._awaited.values())
            if len(awaited) >= self.size and all(each in self._domains for each, _ in awaited):
                logger.warning(
                    "all %d handler threads of worker %s wait for commands that it may have to run itself, and then "
                    "never end: give it a larger thread_pool_size, or those commands another worker: %s",
                    self.size,
                    self._name,
                    ", ".join(str(each) for _, each in awaited[:10]),
                )
            yield
        finally:
            del self._awaited[ident]

    def runs_here(self) -> bool:
        """Whether the calling thread is one of these, with a handler in it."""
        return threading.get_ident() in self._running

    def stuck(self) -> tuple[StuckHandler, ...]:
        """Return the handlers that still run, each with the stack of its thread."""
        frames = sys._current_frames()  # noqa: SLF001 - documented, and the only way
        return tuple(
            StuckHandler(
                lease.claimed.domain,
                lease.claimed.command_id,
                lease.claimed.command_type,
                "".join(traceback.format_stack(frames[ident])) if ident in frames else "",
            )
            for ident, lease in list(self._running.items())
        )

    def _wake(self) -> None:
        if self._work and self._tokens.empty():
            self._tokens.put(_WORK)

    def _next(self) -> Work | None:
        try:
            return self._work.popleft()
        except IndexError:
            return None

    def _serve(self) -> None:
        _here.threads = self
        ident = threading.get_ident()
        while self._tokens.get() is _WORK:
            while (work := self._next()) is not None:
                self._wake()
                _, lease, run, then = work
                self._running[ident] = lease
                try:
                    ending = run(lease)
                finally:
                    del self._running[ident]
                then(lease, ending)
                del lease, run, then, ending, work  # an idle thread keeps nothing of its last command alive
