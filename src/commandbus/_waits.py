"""Waits for the ends of commands: one listener and one statement at a time for all that a bus waits for.

Each command that is waited for is looked at 50 ms after the wait began, and then at intervals that double up to 1 s;
that alone finds every end. A command that was sent with the address of this bus tells it of its end, by NOTIFY in the
transaction that ends it: then it is looked at at once. NOTIFY lets one such commit pass at a time, which is why it is
not done for commands that nobody is known to wait for.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import heapq
import itertools
import logging
import random
import secrets
from collections.abc import Iterator
from datetime import timedelta

from commandbus import _queries
from commandbus._database import Database
from commandbus._failures import brief, is_unavailable, own_copy
from commandbus._listener import CHANNEL, Listener
from commandbus._queries import Key
from commandbus.errors import (
    ClosedError,
    CommandNotFoundError,
    CommandParkedError,
    ConfigurationError,
    ReplyTimeoutError,
)
from commandbus.model import Reply

logger = logging.getLogger("commandbus.wait")

_SHORTEST = 0.05  # seconds between two looks at a command, and what they double up to
_LONGEST = 1.0
_TOGETHER = 0.02  # what is to be looked at so soon is looked at now: 10,000 waits are 50 statements a second at most
_MAX_KEYS = 1000
_CLOSE_SECONDS = 3.0
_ENDS = {"wait": False, "raise": True}


class Patience:
    """How long a caller waits, and whether a parked command ends it. Raises `ConfigurationError`."""

    def __init__(self, timeout: timedelta | None, on_parked: str) -> None:
        if timeout is not None and timeout <= timedelta(0):
            raise ConfigurationError(f"timeout is {timeout}: it must be above zero, or None to wait for ever")
        if on_parked not in _ENDS:
            raise ConfigurationError(f"on_parked is {on_parked!r}: it must be one of {', '.join(_ENDS)}")
        self.timeout = timeout
        self.ends_when_parked = _ENDS[on_parked]
        self._end = None if timeout is None else asyncio.get_running_loop().time() + timeout.total_seconds()

    def bounded(self, seconds: float) -> float:
        """Return so many seconds, or what is left if that is less."""
        return seconds if self.left is None else min(seconds, self.left)

    @property
    def left(self) -> float | None:
        """The seconds that are left; None: without end."""
        return None if self._end is None else max(0.0, self._end - asyncio.get_running_loop().time())


class Wait:
    """One caller that waits for one command."""

    __slots__ = ("ended", "key", "patience", "pause", "sent")

    def __init__(self, key: Key, patience: Patience) -> None:
        self.key = key
        self.patience = patience
        self.pause = _SHORTEST
        self.sent = False  # as far as is known here; from then on a look that does not find it is an answer
        self.ended: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()

    def settle(self, reply: Reply | None) -> None:
        """Tell what was found. None: there is no such command."""
        domain, command_id = self.key
        if self.ended.done():
            return
        if reply is None:
            self.fail(CommandNotFoundError(f'no command {command_id} in domain "{domain}"'))
        elif reply.status.terminal:
            self.ended.set_result(reply)
        elif self.patience.ends_when_parked:
            code = reply.error.code if reply.error else "no error"
            message = f'command {command_id} in domain "{domain}" is parked ({code}): an operator has to decide'
            self.fail(CommandParkedError(message, command_id, domain))

    def fail(self, error: Exception) -> None:
        """Raise this for the caller, unless it is known how the command ended."""
        if not self.ended.done():
            self.ended.set_exception(error)

    def drop(self) -> None:
        """Let asyncio not complain of an error that came after the caller had left."""
        if self.ended.done() and not self.ended.cancelled():
            self.ended.exception()


class Waits:
    """What a bus waits for. Belongs to the loop of its bus, and costs nothing before somebody waits."""

    def __init__(self, database: Database) -> None:
        self.address = f"?{secrets.token_hex(16)}"
        """What `reply_to` says of commands of which this bus wants to be told."""
        self._database = database
        self._waits: dict[str, list[Wait]] = {}  # by command id, as hints have it
        self._hinted: dict[str, None] = {}  # in order
        self._due: list[tuple[float, int, Wait]] = []  # a heap
        self._most = _MAX_KEYS  # fewer while looks fail: 1,000 results of 1 MiB each never came within the deadline
        self._numbers = itertools.count()
        self._stirred = asyncio.Event()
        self._looking: asyncio.Task[None] | None = None
        self._listening: asyncio.Task[None] | None = None

    @contextlib.contextmanager
    def expecting(self, key: Key, patience: Patience) -> Iterator[Wait]:
        """Take notice of what is heard of this command; before it is sent, for it may end before that is known here."""
        wait = Wait(key, patience)
        waits = self._waits.setdefault(str(key[1]), [])
        waits.append(wait)
        try:
            yield wait
        finally:
            wait.drop()
            waits.remove(wait)
            if not waits:
                del self._waits[str(key[1])]

    async def reply(self, wait: Wait, *, at_once: bool = True) -> Reply:
        """Return how the command ended. `at_once`: it may have ended long ago."""
        domain, command_id = wait.key
        wait.sent = True
        self._plan(wait, 0 if at_once else _SHORTEST)
        self._start()
        try:
            async with asyncio.timeout(wait.patience.left):
                return await wait.ended
        except TimeoutError:
            raise ReplyTimeoutError(
                f'command {command_id} in domain "{domain}" has not ended within {wait.patience.timeout}: it may still '
                "end; wait again for this domain and id",
                command_id,
                domain,
            ) from None
        except asyncio.CancelledError as error:
            error.add_note(f'command {command_id} in domain "{domain}" was waited for: it may still end')
            raise

    async def close(self) -> None:
        """Let nobody wait any longer."""
        for wait in self._all():
            message = f"the bus was closed while command {wait.key[1]} was waited for: it may still end"
            wait.fail(ClosedError(message))
        tasks = [task for task in (self._looking, self._listening) if task is not None]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=_CLOSE_SECONDS)

    def _all(self) -> list[Wait]:
        return [wait for waits in self._waits.values() for wait in waits]

    def _plan(self, wait: Wait, seconds: float) -> None:
        heapq.heappush(self._due, (asyncio.get_running_loop().time() + seconds, next(self._numbers), wait))
        if self._due[0][2] is wait:
            self._stirred.set()

    def _start(self) -> None:
        """Look and listen, each in an empty context: it serves many callers."""
        loop = asyncio.get_running_loop()
        if self._looking is None:
            self._looking = loop.create_task(self._look_on(), context=contextvars.Context())
        if self._listening is None and not self._database.transaction_pooler:
            listener = Listener(self._database, CHANNEL + self.address, "ping", self._hear, logger)
            self._listening = loop.create_task(listener.run(), context=contextvars.Context())

    def _hear(self, hint: str) -> None:
        """Look at once at the commands of these ids; at all if there is none, for what ended before was missed."""
        heard = hint.split() if hint else self._waits
        self._hinted.update(dict.fromkeys(command_id for command_id in heard if command_id in self._waits))
        if self._hinted:
            self._stirred.set()

    async def _look_on(self) -> None:
        """Look for the ends of what is waited for, one statement at a time, while somebody waits."""
        try:
            while self._waits:
                if found := self._take():
                    await self._look(found)
                else:
                    await self._sleep()
        finally:  # in the step that found nothing: who comes next starts another
            self._looking = None

    async def _sleep(self) -> None:
        """Sleep until something is due or heard."""
        loop = asyncio.get_running_loop()
        self._stirred.clear()
        timer = loop.call_at(self._due[0][0] if self._due else loop.time() + _LONGEST, self._stirred.set)
        try:
            await self._stirred.wait()
        finally:
            timer.cancel()

    def _take(self) -> list[Wait]:
        """Take what was heard of, then what is due; of as many commands as a look may be for, about."""
        found: list[Wait] = []
        while self._hinted and len(found) < self._most:
            command_id = next(iter(self._hinted))
            del self._hinted[command_id]
            found += [wait for wait in self._waits.get(command_id, ()) if not wait.ended.done()]
        now = asyncio.get_running_loop().time()
        if not found and self._due and self._due[0][0] > now:
            return []
        while self._due and self._due[0][0] <= now + _TOGETHER and len(found) < self._most:
            wait = heapq.heappop(self._due)[2]
            if not wait.ended.done():
                found.append(wait)
                self._plan(wait, wait.pause * random.uniform(0.8, 1.2))  # noqa: S311 - spread, not a secret
                wait.pause = min(_LONGEST, wait.pause * 2)
        return found

    async def _look(self, waits: list[Wait]) -> None:
        keys: dict[Key, bool] = {}
        for wait in waits:
            keys[wait.key] = keys.get(wait.key, False) or wait.patience.ends_when_parked
        sent = {wait for wait in waits if wait.sent}  # now: what is sent meanwhile, this look cannot see
        try:
            found = await self._database.repeat(_queries.outcomes(keys))
        except Exception as error:  # noqa: BLE001 - whatever it is, it is theirs who wait
            if is_unavailable(error):
                self._most = max(1, len(keys) // 2)
                logger.info("%d commands could not be looked at, again soon: %s", len(keys), brief(error))
            else:
                for wait in waits:
                    wait.fail(own_copy(error))
        else:
            self._most = min(_MAX_KEYS, self._most * 2)
            for wait in waits:
                if wait.key in found and (found[wait.key] or wait in sent):
                    wait.settle(found[wait.key])
