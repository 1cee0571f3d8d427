"""Sends of threads, carried by the threads themselves: who finds the connection free takes along all that waits.

Through the loop a send changes threads twice, which costs as much as its statement. Here it waits for the disk in its
own thread; and while it does, others gather for the next statement, which one of them carries.

Whose a parcel is: in `_waiting` or `_carried` it is ours, and changes under the lock only; else it is the loop's. What
goes wrong, or takes long, ends the loan of the connection, and all goes on through the send buffer, which knows what
each trouble means. So nothing of that is here, and a thread that was interrupted in the wrong moment holds up nobody
for good.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter, deque
from collections.abc import Callable, Collection
from functools import partial
from threading import Lock, RLock, get_ident
from time import monotonic
from weakref import WeakSet

import psycopg

from commandbus import _calls, _database
from commandbus._calls import Outgoing, Row
from commandbus._chunks import receipt
from commandbus._database import hung_up, sever
from commandbus._failures import brief, is_connection_lost
from commandbus._hints import LIGHT, LOADED, Hints
from commandbus._send_buffer import LOCK_TIMEOUT_MS, Parcel, SendBuffer, take
from commandbus.errors import CommandBusError
from commandbus.model import Receipt
from commandbus.sync.call import SETTLE_SECONDS
from commandbus.sync.loan import Loan
from commandbus.sync.runtime import SyncRuntime

_LENT = 60.0  # seconds; then the connection goes back to its pool, which replaces it when it is old
_PATIENCE = 1.0  # seconds for which a parcel waits to be taken along; also how long a wait may be deaf to signals
_RESTED = 0.1  # seconds without a statement, after which it is asked whether the server has hung up: 16 threads would
# pay for it with a change of thread
_LEAVES = 0.5  # seconds that a thread has at most to leave a connection that was severed


class Sender:
    """Sends of one open bus from any thread, on a connection that its send buffer lends."""

    def __init__(self, runtime: SyncRuntime, buffer: SendBuffer, hints: Hints, *, transaction_pooler: bool) -> None:
        self._runtime = runtime
        self._buffer = buffer
        self._hints = hints
        self._pooler = transaction_pooler
        self._prepared: WeakSet[psycopg.AsyncConnection[Row]] = WeakSet()
        self._lock = RLock()  # a handler of signals may send
        self._waiting: deque[Parcel] = deque()
        self._carried: list[Parcel] = []  # by the statement that runs
        self._left: list[Parcel] = []  # by a statement that its thread has left: the loop's
        self._leader: Parcel | None = None  # whose thread carries, or is about to
        self._leading = 0  # that thread, while it does
        self._since = 0.0  # when there was a new leader
        self._used = 0.0  # when a statement ended
        self._loan: Loan | None = None
        self._recalled = False
        self._sent: Counter[str] = Counter()  # domains whose workers have had no hint yet
        self._hinting = False

    def send(self, outgoing: Outgoing, timeout: float) -> Receipt:
        """Send one command and wait until it is durable. Raises what `CommandBus.send` raises."""
        gate = Lock()
        gate.acquire()
        parcel = Parcel([outgoing], partial(_open, gate))
        try:
            self._bring(parcel, gate, timeout)
            return receipt(outgoing, *parcel.result())  # in here: Ctrl-C may come after the outcome
        except CommandBusError:
            raise
        except BaseException as interruption:
            if parcel.waits or self._leader is parcel:
                self._give_up(parcel, gate, 0)
            if interruption is not parcel.error:
                interruption.add_note(parcel.fate)
            raise
        finally:
            del parcel

    def _bring(self, parcel: Parcel, gate: Lock, timeout: float) -> None:
        """Bring it to its outcome: as leader, taken along by another, or through the loop."""
        end = monotonic() + timeout
        if not self._join(parcel):
            self._hand_over(parcel)
        while parcel.waits:
            left = end - monotonic()
            if left <= 0:
                self._give_up(parcel, gate, timeout)
                return
            if self._leader is parcel:
                self._lead(left)
            elif not gate.acquire(timeout=min(_PATIENCE, left)) and left > _PATIENCE:
                self._lose_patience(parcel)

    def _join(self, parcel: Parcel) -> bool:
        """Line up; False: there is no connection for it."""
        with self._lock:
            if self._loan is None or self._recalled or self._leading == get_ident():
                return False
            if self._leader is None:
                self._leader, self._since = parcel, monotonic()
            self._waiting.append(parcel)
            return True

    def _lead(self, left: float) -> None:
        """Carry what waits, own parcel first, in one statement; then it is another's turn."""
        rested = monotonic() - self._used > _RESTED
        with self._lock:
            loan = self._loan
            if loan is None:
                return
            if rested and hung_up(loan.connection):
                loan.broken = True
                self._end_loan(loan, None)
                return
            loan.in_use, self._leading = True, get_ident()
            waiting = deque(self._waiting)
            batch = take(waiting)
            self._carried, self._waiting = batch, waiting  # in one: no exception from outside comes between the two
            for parcel in batch:
                parcel.under_way = True
        rows = [row for parcel in batch for row in parcel.rows()]
        try:
            outcomes = loan.execute(_calls.send(rows, LOCK_TIMEOUT_MS), left)
        except psycopg.Error as error:
            with self._lock:
                loan.in_use = False
                self._end_loan(loan, error)
        except TimeoutError:
            self._leave(loan)
        except BaseException:
            self._leave(loan)
            raise
        else:
            self._settle(loan, batch, outcomes)

    def _leave(self, loan: Loan) -> None:
        """Leave the statement that runs to the loop: this thread has to go on."""
        with self._lock:
            loan.in_use = False
            if self._loan is loan:
                self._left, self._carried = self._carried, []
            self._end_loan(loan, None)

    def _settle(self, loan: Loan, batch: list[Parcel], outcomes: list[str]) -> None:
        with self._lock:
            loan.in_use, self._used = False, monotonic()
            if self._loan is not loan:  # it was ended meanwhile, and the parcels are the loop's
                self._end_loan(loan, None)
                return
            settled = [parcel for parcel in batch if parcel.waits]
            for parcel, outcome in zip(batch, outcomes, strict=True):
                if parcel.waits:
                    parcel.outcomes = [outcome]
            self._carried = []
            self._sent.update({one.domain for parcel in batch for one in parcel.outgoings})
            if not self._hinting:
                self._runtime.submit(self._hint, _ignore)
                self._hinting = True
            self._pass_on()
        for parcel in settled:  # who is not woken, because this thread is interrupted, looks within a second
            parcel.wake()

    def _pass_on(self) -> None:
        """Let the next lead, or end a loan that was recalled; under the lock."""
        self._leader, self._leading = None, 0
        while self._waiting and not self._waiting[0].waits:
            self._waiting.popleft()
        if self._recalled and self._loan is not None:
            self._end_loan(self._loan, None)
        elif self._waiting:
            self._leader, self._since = self._waiting[0], monotonic()
            self._leader.wake()

    # -- when it does not go well --------------------------------------------------------------------------------------

    def _give_up(self, parcel: Parcel, gate: Lock, timeout: float) -> None:
        """Give up after so many seconds, wherever the parcel is."""
        with self._lock:
            if self._leader is parcel and self._loan is not None:
                self._loan.in_use = False
                if self._carried:
                    self._leave(self._loan)
            ours = parcel in self._waiting or parcel in self._carried
            if ours:
                parcel.expire(timeout)
            if self._leader is parcel:
                self._pass_on()
        if not ours:
            self._runtime.submit(partial(parcel.expire, timeout), parcel.fail)
            end = monotonic() + SETTLE_SECONDS
            while parcel.waits and (left := end - monotonic()) > 0:
                gate.acquire(timeout=min(_PATIENCE, left))

    def _lose_patience(self, parcel: Parcel) -> None:
        """Go through the loop, which has other connections; and see whether the leader can be alive."""
        with self._lock:
            if self._leader is not parcel and parcel in self._waiting:
                self._waiting.remove(parcel)
                self._hand_over(parcel)
            late = monotonic() - self._since > _database.CALL_SECONDS + _PATIENCE
            if late and self._leader is not None and (loan := self._loan) is not None:
                sever(loan.connection)
                self._end_loan(loan, _unanswered())
                self._runtime.submit(partial(_soon, loan.finish), _ignore)  # if the leader does not

    def _hand_over(self, parcel: Parcel) -> None:
        parcel.under_way = False
        self._runtime.submit(partial(self._buffer.put, parcel), parcel.fail)

    def _end_loan(self, loan: Loan, error: psycopg.Error | None) -> None:
        """Hand all that is ours over to the loop, and the connection once no thread uses it; under the lock.

        `error`: what became of the statement.
        """
        if self._loan is loan:
            _blame(self._carried, error)
            for parcel in (*self._carried, *self._waiting):
                self._hand_over(parcel)
            self._carried = []
            self._waiting.clear()
            self._loan, self._recalled, self._leader, self._leading = None, False, None, 0
            loan.broken = loan.broken or _breaks(error)
        if not loan.in_use:
            self._runtime.submit(loan.finish, _ignore)

    # -- on the loop ---------------------------------------------------------------------------------------------------

    async def borrow(self, connection: psycopg.AsyncConnection[Row]) -> Collection[str]:
        """Use this connection until it is recalled, or for a minute; closed if it broke.

        Returns the domains whose workers have had no hint yet.
        """
        loop = asyncio.get_running_loop()
        finished: asyncio.Future[None] = loop.create_future()
        loan = Loan(connection, partial(_finish, finished))
        self._recalled = False
        timer = loop.call_later(_LENT, self.recall)
        try:
            await self._make_ready(loan)
            await asyncio.shield(finished)
            if self._left:
                await self._complete(loan)
        except asyncio.CancelledError:
            loan.broken = True
            sever(connection)
            with self._lock:
                self._end_loan(loan, _cancelled())
            self._put_back(_cancelled())
            await asyncio.wait([finished], timeout=_LEAVES)  # no thread should use it when it is closed
            raise
        finally:
            timer.cancel()
            if loan.broken:
                await connection.close()
        return self._take_hints()

    async def _make_ready(self, loan: Loan) -> None:
        """Offer it to the threads, with the statement prepared; a pooler gives each transaction another session."""
        try:
            if loan.connection in self._prepared:
                loan.prepared = True
            elif not self._pooler:
                await loan.prepare(_calls.send((), LOCK_TIMEOUT_MS))
                self._prepared.add(loan.connection)
        except psycopg.Error:  # who sends next finds out
            loan.broken = True
            loan.finish()
            return
        with self._lock:
            if self._recalled:
                loan.finish()
            else:
                self._loan = loan

    async def _complete(self, loan: Loan) -> None:
        """Bring the statement that a thread has left to its end."""
        try:
            outcomes = await loan.complete()
        except psycopg.Error as error:
            loan.broken = loan.broken or _breaks(error)
            self._put_back(error)
            return
        if outcomes is None:
            self._put_back(_unanswered())
            return
        for parcel, outcome in zip(self._left, outcomes, strict=True):
            parcel.settle([outcome])
        self._left = []

    def _put_back(self, error: psycopg.Error) -> None:
        """Send again what a statement carried that a thread has left."""
        left, self._left = self._left, []
        _blame(left, error)
        for parcel in left:
            parcel.under_way = False
            self._buffer.put(parcel)

    def recall(self) -> None:
        """Ask for the connection back, as soon as the statement that runs has ended."""
        with self._lock:
            self._recalled = True
            if self._leader is None:
                self._pass_on()

    def _take_hints(self) -> Counter[str]:
        with self._lock:
            sent, self._sent = self._sent, Counter()
            return sent

    def _hint(self, again: float = LIGHT) -> None:
        """Have hints given for what was sent, and look again in so many seconds, until there was nothing.

        Ever later under load: of 16 processes with a sender each, a look every 10 ms takes a sixth of what they send.
        """
        with self._lock:
            sent = self._take_hints()
            self._hinting = bool(sent)
        if sent:
            self._hints.owe(sent, committed=True)
            asyncio.get_running_loop().call_later(again, self._hint, min(2 * again, LOADED))


def _open(gate: Lock) -> None:
    with contextlib.suppress(RuntimeError):  # it is open already, and whoever waits will look
        gate.release()


def _finish(finished: asyncio.Future[None]) -> None:
    if not finished.done():
        finished.set_result(None)


def _soon(finish: Callable[[], object]) -> None:
    asyncio.get_running_loop().call_later(_LEAVES, finish)


def _ignore(closed: Exception) -> None:
    """Do nothing: the loop has ended, and so has all that was on it."""


def _cancelled() -> psycopg.OperationalError:
    return psycopg.OperationalError("the bus was closed")


def _unanswered() -> psycopg.OperationalError:
    return psycopg.OperationalError("the thread that sent it was interrupted")


def _blame(parcels: list[Parcel], error: psycopg.Error | None) -> None:
    """Note on the parcels of a statement what became of it."""
    if error is not None:
        for parcel in parcels:
            parcel.maybe_sent = parcel.maybe_sent or is_connection_lost(error)
            parcel.trouble = brief(error)


def _breaks(error: psycopg.Error | None) -> bool:
    """Whether the connection is not to be used again, the session of a former primary included."""
    return error is not None and (is_connection_lost(error) or isinstance(error, psycopg.errors.ReadOnlySqlTransaction))
