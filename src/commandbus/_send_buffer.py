"""Concurrent sends of a bus, put together: each free flush connection takes all that waits, as one statement.

No linger: a single send leaves at once; rows pile up only while flushes are under way. 16 senders: 9,793 sends/s on
4 connections, where one connection each does 5,507.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import logging
import random
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Sequence
from itertools import islice
from typing import Protocol, TypeAlias
from uuid import UUID

import psycopg

from commandbus import _calls
from commandbus._calls import Outgoing, Row
from commandbus._database import Database, execute, hung_up
from commandbus._failures import brief, is_connection_lost, is_refusal, is_unavailable, own_copy, refusal
from commandbus._hints import Hints
from commandbus._limits import MAX_BYTES
from commandbus.errors import ClosedError, OutcomeUnknownError, SendTimeoutError

logger = logging.getLogger("commandbus.send")

MAX_ROWS = 1000
LOCK_TIMEOUT_MS = 50
"""How long a flush waits for a rival's uncommitted command of the same id, before that row goes to its own lane."""
_KEPT = 0.05
"""Seconds for which a flush keeps its connection with nothing to send: less than any other call waits for one."""
_PAUSE = 0.1  # seconds, at least, between two tries without a connection
_LOCK_NOT_AVAILABLE = "55P03"


class Parcel:
    """The commands of one call, which share their outcome: one of `send`, a chunk of `send_batch`.

    `wake` is called once, on the loop, when it is settled; then either `outcomes` or `error` is there.
    """

    __slots__ = ("error", "maybe_sent", "outcomes", "outgoings", "size", "trouble", "under_way", "wake")

    def __init__(self, outgoings: Sequence[Outgoing], wake: Callable[[], object]) -> None:
        self.outgoings = outgoings
        self.wake = wake
        self.size = sum(len(outgoing.text) for outgoing in outgoings)
        self.outcomes: list[str] | None = None
        self.error: Exception | None = None
        self.under_way = False  # in a statement that runs now
        self.maybe_sent = False  # was in a statement whose connection broke
        self.trouble = ""  # what was wrong with the last try

    @property
    def waits(self) -> bool:
        return self.outcomes is None and self.error is None

    @property
    def minted(self) -> bool:
        """Whether the database cannot know any of its ids yet."""
        return not self.maybe_sent and all(outgoing.minted for outgoing in self.outgoings)

    @property
    def first_id(self) -> UUID:
        return self.outgoings[0].command_id

    @property
    def name(self) -> str:
        return f"command {self.first_id}" if len(self.outgoings) == 1 else f"a batch from command {self.first_id} on"

    def rows(self) -> list[str]:
        return [outgoing.row(minted=outgoing.minted and not self.maybe_sent) for outgoing in self.outgoings]

    def settle(self, outcomes: list[str]) -> None:
        if self.waits:
            self.outcomes = outcomes
            self.wake()

    def fail(self, error: Exception) -> None:
        if self.waits:
            self.error = error
            self.wake()

    def expire(self, timeout: float) -> None:
        """Give up after so many seconds: withdrawn if it still waits, else of unknown outcome."""
        why = self.trouble and f"; the last try: {self.trouble}"
        if self.under_way or self.maybe_sent:
            doubt = f"{self.name} may or may not have been sent within {timeout:.1f} s"
            message = f"{doubt}: send it again with this id{why}"
            self.fail(OutcomeUnknownError(message, self.first_id))
        else:
            message = f"{self.name} was withdrawn after {timeout:.1f} s: it was not sent{why}"
            self.fail(SendTimeoutError(message, self.first_id))

    def abandon(self) -> None:
        """Give up because the bus or its loop ends."""
        if self.maybe_sent:
            message = f"{self.name} may or may not have been sent before the bus was closed: send it again with this id"
            self.fail(OutcomeUnknownError(message, self.first_id))
        else:
            self.fail(ClosedError(f"the bus was closed: {self.name} was not sent"))

    def withdraw(self) -> None:
        """Give up because the caller was interrupted, and tell nobody but `fate`."""
        self.expire(0)

    def result(self) -> list[str]:
        """Return the outcomes, or raise why there are none; `OutcomeUnknownError` when it is not settled."""
        if self.outcomes is not None:
            return self.outcomes
        if self.error is None:
            raise OutcomeUnknownError(f"{self.name} may have been sent: send it again with this id", self.first_id)
        try:
            raise self.error
        finally:
            del self  # no cycle of exception, traceback and frame keeps the caller's locals alive

    @property
    def fate(self) -> str:
        """What an interrupted caller is told, as a note on its exception."""
        if self.outcomes is not None:
            return f"{self.name} was sent"
        # Not `under_way`: when the caller asks, in its own thread, the statement may have come to its end.
        doubt = self.waits or self.maybe_sent or isinstance(self.error, OutcomeUnknownError)
        return f"{self.name} {'may have been sent' if doubt else 'was withdrawn: it was not sent'}"


_More: TypeAlias = Callable[[psycopg.AsyncConnection[Row]], Awaitable[list[Parcel]]]


async def _nothing(_: psycopg.AsyncConnection[Row]) -> list[Parcel]:
    return []


def _wake(idle: asyncio.Future[None]) -> None:
    if not idle.done():
        idle.set_result(None)


def take(waiting: deque[Parcel]) -> list[Parcel]:
    """Take out as many of those that wait, in order, as one statement carries."""
    batch: list[Parcel] = []
    rows = size = 0
    while waiting and rows < MAX_ROWS and size < MAX_BYTES:
        parcel = waiting.popleft()
        if parcel.waits:
            batch.append(parcel)
            rows += len(parcel.outgoings)
            size += parcel.size
    return batch


class Borrower(Protocol):
    """Who sends on a connection of the buffer's, in other threads."""

    async def borrow(self, connection: psycopg.AsyncConnection[Row], /) -> Collection[str]:
        """Use the connection for a while. Returns the domains whose workers have had no hint yet."""

    def recall(self) -> None:
        """Have `borrow` return soon."""


class SendBuffer:
    """The waiting sends of one bus, and the flushes that carry them. Belongs to the loop of its bus."""

    def __init__(self, database: Database, hints: Hints, *, connections: int) -> None:
        self._database = database
        self._hints = hints
        self._connections = connections
        self._waiting: deque[Parcel] = deque()
        self._contended: deque[Parcel] = deque()
        self._flushing = 0
        self._idle: list[asyncio.Future[None]] = []  # flushes that keep their connection for what may come
        self._called = False  # one was woken or started, and has not come to take yet
        self._flushes: set[asyncio.Task[None]] = set()
        self._contended_flush: asyncio.Task[None] | None = None
        self._borrower: Borrower | None = None
        self._lent = False
        self._draining = False

    def lend_to(self, borrower: Borrower) -> None:
        """Let this borrower use one of the connections, from the next send on; on the loop only."""
        self._borrower = self._borrower or borrower

    def put(self, parcel: Parcel) -> None:
        """Take a parcel on its way; on the loop only."""
        if self._draining:
            parcel.abandon()
            return
        self._waiting.append(parcel)
        self._start()

    async def send(self, outgoings: Sequence[Outgoing], timeout: float) -> list[str]:
        """Return the outcomes once the commands are durable: accepted, duplicate or conflict.

        After `timeout` seconds, or when cancelled, they are withdrawn if they still wait. If they are under way they
        may arrive: `OutcomeUnknownError`, or a note on the CancelledError.
        """
        loop = asyncio.get_running_loop()
        settled: asyncio.Future[None] = loop.create_future()
        parcel = Parcel(outgoings, lambda: None if settled.done() else settled.set_result(None))
        timer = loop.call_later(timeout, parcel.expire, timeout)
        self.put(parcel)
        try:
            await settled
        except asyncio.CancelledError as error:
            parcel.withdraw()
            error.add_note(parcel.fate)
            raise
        finally:
            timer.cancel()
        return parcel.result()

    async def drain(self) -> None:
        """Refuse what comes from now on, and wait until nothing is under way; cancelled, refuse what waits as well."""
        self._draining = True
        for idle in self._idle:
            _wake(idle)
        self._recall()
        try:
            while self._flushes or self._contended_flush is not None:
                tasks = [*self._flushes, *filter(None, [self._contended_flush])]
                await asyncio.wait(tasks)
        finally:
            for parcel in (*self._waiting, *self._contended):
                parcel.abandon()

    def _start(self) -> None:
        """Call one flush for all that waits: an idle one, or another. Of a burst of 16, four would take a few each."""
        if self._called:
            return
        if self._idle:
            self._called = True
            _wake(self._idle.pop())
        elif self._flushing < self._connections:
            self._called = True
            self._flushing += 1
            # An empty context: the flush serves many callers and must not run under the trace of the first.
            task = asyncio.get_running_loop().create_task(self._flush(), context=contextvars.Context())
            self._flushes.add(task)
            task.add_done_callback(self._flushes.discard)
        elif self._connections == 1:
            self._recall()

    def _recall(self) -> None:
        if self._lent and self._borrower is not None:
            self._borrower.recall()

    async def _flush(self) -> None:
        try:
            while batch := self._take():
                await self._deliver(batch, self._more)
        finally:  # in the step that found nothing: who comes next starts another
            self._flushing -= 1

    async def _more(self, connection: psycopg.AsyncConnection[Row]) -> list[Parcel]:
        """Take what waits, or what comes soon; but first lend the connection, if it is wanted and not the last."""
        if self._borrower is not None and not self._lent and not self._draining:
            if not self._waiting or self._connections > 1:
                await self._lend(connection, self._borrower)
        elif not self._waiting and not self._draining:
            await self._idle_for_a_while()
        return self._take()

    async def _lend(self, connection: psycopg.AsyncConnection[Row], borrower: Borrower) -> None:
        self._lent = True
        if self._waiting:
            self._start()
        try:
            domains = await borrower.borrow(connection)
        finally:
            self._lent = False
        if domains and connection.closed:
            self._hints.owe(domains, committed=True)
        elif domains:
            await self._hints.give(connection, domains)

    async def _idle_for_a_while(self) -> None:
        loop = asyncio.get_running_loop()
        idle: asyncio.Future[None] = loop.create_future()
        self._idle.append(idle)
        timer = loop.call_later(_KEPT, _wake, idle)
        try:
            await idle
        finally:
            timer.cancel()
            with contextlib.suppress(ValueError):  # it was called
                self._idle.remove(idle)

    def _take(self) -> list[Parcel]:
        self._called = False
        batch = take(self._waiting)
        if self._waiting:
            self._start()
        return batch

    async def _deliver(self, batch: list[Parcel], more: _More = _nothing) -> None:
        """Bring each parcel of the batch to its outcome, whatever happens on the way; then those of `more`."""
        while batch := [parcel for parcel in batch if parcel.waits]:
            try:
                await self._try(batch, more)
            except asyncio.CancelledError:  # the loop ends; a blocked thread would hear of it from nobody else
                for parcel in batch:
                    parcel.abandon()
                raise
            except Exception as error:  # noqa: BLE001 - every ending is told to its callers
                if not await self._sort_out(batch, error):
                    return

    async def _try(self, batch: list[Parcel], more: _More) -> None:
        """Send the batch as one statement, then what `more` puts in its place; raises what is wrong with the last.

        Ends early, with parcels in the batch that wait, when the connection broke while there was nothing to send.
        """
        async with self._database.connection() as connection:
            while batch and not hung_up(connection):
                await self._execute(connection, batch)
                batch[:] = await more(connection)

    async def _execute(self, connection: psycopg.AsyncConnection[Row], batch: list[Parcel]) -> None:
        """Send the batch as one statement; settles all parcels or raises."""
        batch = [parcel for parcel in batch if parcel.waits]  # some gave up while there was no connection
        rows = [row for parcel in batch for row in parcel.rows()]
        for parcel in batch:
            parcel.under_way = True
        try:
            outcomes = await execute(connection, _calls.send(rows, LOCK_TIMEOUT_MS))
        except BaseException as error:
            lost = is_connection_lost(error) or isinstance(error, asyncio.CancelledError)
            for parcel in batch:
                parcel.maybe_sent = parcel.maybe_sent or lost
            raise
        finally:
            for parcel in batch:
                parcel.under_way = False
        answers = iter(outcomes)
        for parcel in batch:
            parcel.settle(list(islice(answers, len(parcel.outgoings))))
        sent = [one for parcel in batch for one in parcel.outgoings]
        awaited = {one.domain for one in sent if one.awaited}
        await self._hints.give(connection, {one.domain for one in sent}, awaited)

    async def _sort_out(self, batch: list[Parcel], error: Exception) -> bool:
        """Decide what a failed flush means for its parcels. True: try those that still wait again, as they are."""
        state = getattr(error, "sqlstate", None) or ""
        for parcel in batch:
            parcel.trouble = brief(error)
        if state == _LOCK_NOT_AVAILABLE and not all(parcel.minted for parcel in batch):
            await self._set_contended_apart(batch)
        elif is_refusal(error):  # never split on 08 or 57
            if len(batch) == 1:
                batch[0].fail(own_copy(refusal(error, batch[0].name)))
            else:
                await self._halve(batch)
        elif is_unavailable(error):
            logger.warning("a flush of %d commands failed and is repeated: %s", len(batch), brief(error))
            if not is_connection_lost(error):  # for another connection there is no need to wait
                await asyncio.sleep(_PAUSE * random.uniform(1, 2))  # noqa: S311 - spread, not a secret
            return True
        else:
            for parcel in batch:
                parcel.fail(own_copy(error))
        return False

    async def _halve(self, batch: list[Parcel]) -> None:
        middle = len(batch) // 2
        await self._deliver(batch[:middle])
        await self._deliver(batch[middle:])

    async def _set_contended_apart(self, batch: list[Parcel]) -> None:
        """Find the rows that wait for a rival's uncommitted twin; they go on in a lane of their own.

        Four flushes that wait for a lock would stop all sends, also that of the rival itself.
        """
        own = [parcel for parcel in batch if not parcel.minted]
        if len(own) < len(batch):
            await self._deliver([parcel for parcel in batch if parcel.minted])
            await self._deliver(own)
        elif len(own) > 1:
            await self._halve(own)
        else:
            self._contended += own
            if self._contended_flush is None:
                self._contended_flush = asyncio.get_running_loop().create_task(
                    self._flush_contended(), context=contextvars.Context()
                )

    async def _flush_contended(self) -> None:
        while self._contended:
            for _ in range(len(self._contended)):
                await self._deliver([self._contended.popleft()])
            await asyncio.sleep(LOCK_TIMEOUT_MS / 1000)
        self._contended_flush = None
