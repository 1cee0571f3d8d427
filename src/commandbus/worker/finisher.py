"""Records how deliveries ended, many in one call."""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import psycopg

from commandbus import _calls
from commandbus._calls import Answers, Call
from commandbus._database import Database
from commandbus._failures import brief, is_refusal
from commandbus._limits import MAX_BYTES
from commandbus.errors import CommandBusError
from commandbus.worker.endings import Completed, Ending, Failed, Recorded, Released, failed, unstorable, without_words
from commandbus.worker.leases import Lease, Leases

logger = logging.getLogger("commandbus.worker")

MAX_BATCH = 500
_BUSY_PAUSE = 0.05  # seconds
_MAX_PAUSE = 2.0


class Outcome(NamedTuple):
    """How a delivery ended; `item` says so in a call, written when there is time: while another call is under way."""

    lease: Lease
    ending: Ending
    item: str


class Finisher:
    """Takes endings and records them; a lease is let go when its ending is recorded, or was lost.

    That recording fails is no failure of the handler: the recording is repeated, the handler is not.

    While `carried`, completions wait for the claimer, whose next call takes them along: one round trip and one commit
    for both.
    """

    def __init__(
        self,
        database: Database,
        leases: Leases,
        freed: Callable[[], None],
        wake: Callable[[frozenset[str]], None],
    ) -> None:
        self._database = database
        self._leases = leases
        self._freed = freed
        self._wake = wake
        self._waiting: list[Outcome] = []
        self._to_carry: defaultdict[str, list[Outcome]] = defaultdict(list)  # by domain
        self._carried = False
        self._arrived = asyncio.Event()
        self._closing = False
        self._pause = 0.0

    def put(self, lease: Lease, ending: Ending) -> None:
        """Take an ending; does not wait."""
        outcome = Outcome(lease, ending, lease.item(_fields(ending)))
        if self._carried and isinstance(ending, Completed):
            self._to_carry[lease.claimed.domain].append(outcome)
        else:
            self._waiting.append(outcome)
            self._arrived.set()

    def carry(self, *, carried: bool) -> None:
        """From now on completions wait for `take`, or no longer."""
        self._carried = carried
        if not carried:
            for outcomes in self._to_carry.values():
                self._waiting += outcomes
            self._to_carry.clear()
            self._arrived.set()

    def take(self, domain: str) -> list[Outcome]:
        """Hand over completions of this domain, as many as one statement carries; `settle` them or `give_back`."""
        waiting = self._still_held(self._to_carry.pop(domain, ()))
        taken = next(_parts(waiting), [])
        if len(taken) < len(waiting):
            self._to_carry[domain] = waiting[len(taken) :]
        return taken

    def carries(self, domain: str) -> bool:
        """Whether completions of this domain wait for `take`."""
        return domain in self._to_carry

    def give_back(self, outcomes: list[Outcome]) -> None:
        """Take back what could not be recorded, and carry it no more: nothing might wake the claimer for it."""
        self._waiting += outcomes
        self._arrived.set()

    def settle(self, outcomes: list[Outcome], answers: Answers, unsaid: str) -> None:
        """Let go of what was recorded or lost; busy is tried again. What `answers` leaves out is `unsaid`."""
        self._pause = 0.0
        over: list[Lease] = []
        for outcome in outcomes:
            match answers.get(outcome.lease.claimed.command_id, unsaid) if answers else unsaid:
                case "done":
                    over.append(outcome.lease)
                case "busy":
                    asyncio.get_running_loop().call_later(_BUSY_PAUSE, self.give_back, [outcome])
                case _:
                    over.append(self._lost(outcome.lease))
        self._let_go(over)

    def close(self) -> None:
        """Let `run` return once every ending is recorded."""
        self._closing = True
        self._arrived.set()

    async def run(self) -> None:
        """Record what arrives, until closed."""
        while not (self._closing and not len(self._leases)):
            await self._arrived.wait()
            self._arrived.clear()
            while self._waiting:
                batch, self._waiting = self._waiting, []
                await self._record_all(batch)

    async def _record_all(self, batch: list[Outcome]) -> None:
        groups: defaultdict[tuple[str, type], list[Outcome]] = defaultdict(list)
        for outcome in self._still_held(batch):
            groups[outcome.lease.claimed.domain, type(outcome.ending)].append(outcome)
        for (domain, _), outcomes in groups.items():
            for part in _parts(outcomes):
                await self._record(domain, part)

    async def _record(self, domain: str, outcomes: list[Outcome]) -> None:
        try:
            answers = await self._database.run(_call(domain, outcomes))
        except (CommandBusError, psycopg.Error) as error:
            if is_refusal(error):
                await self._find_refused(domain, outcomes, error)
            else:
                await self._again_later(outcomes, error)
            return
        self.settle(outcomes, answers, unsaid="lost")
        self._freed()

    def _still_held(self, outcomes: Iterable[Outcome]) -> list[Outcome]:
        """Let go of what is recorded already or lost, and return the rest."""
        held, over = [], []
        for outcome in outcomes:
            if isinstance(outcome.ending, Recorded):
                over.append(outcome.lease)
            elif not outcome.lease.held:
                over.append(self._lost(outcome.lease))
            else:
                held.append(outcome)
        if over:
            self._let_go(over)
            self._freed()
        return held

    async def _find_refused(self, domain: str, outcomes: list[Outcome], error: Exception) -> None:
        """Halve the batch until the ending stands alone that the database refuses; it fails for good, and says why."""
        if len(outcomes) > 1:
            middle = len(outcomes) // 2
            await self._record(domain, outcomes[:middle])
            await self._record(domain, outcomes[middle:])
            return
        lease, ending, _ = outcomes[0]
        logger.error("PostgreSQL refuses the outcome: %s", brief(error), extra=lease.log_extra(self._leases.worker))
        if isinstance(ending, Completed):
            self.put(lease, failed(unstorable(error), lease.handler, lease.claimed.attempts + 1))
        elif isinstance(ending, Failed) and not ending.replaced:
            self.put(lease, without_words(ending, error))
        else:
            self._let_go([lease])  # nothing of ours is left to say: the lease runs out
            self._freed()

    async def _again_later(self, outcomes: list[Outcome], error: Exception) -> None:
        self._pause = min(_MAX_PAUSE, max(0.1, self._pause * 2))
        logger.warning(
            "%d outcomes could not be recorded, again in %.1f s: %s", len(outcomes), self._pause, brief(error)
        )
        await asyncio.sleep(self._pause)
        self.give_back(outcomes)

    def _lost(self, lease: Lease) -> Lease:
        logger.warning(
            "the lease was lost before its outcome was recorded; nothing was changed",
            extra=lease.log_extra(self._leases.worker),
        )
        return lease

    def _let_go(self, leases: list[Lease]) -> None:
        self._leases.remove(leases)
        if wakes := [lease.wakes for lease in leases if lease.wakes]:
            self._wake(frozenset().union(*wakes))
        if self._closing:
            self._arrived.set()


def _parts(outcomes: list[Outcome]) -> Iterator[list[Outcome]]:
    """Cut into what one statement carries: 500 outcomes, about 1 MiB of results."""
    part: list[Outcome] = []
    size = 0
    for outcome in outcomes:
        part.append(outcome)
        size += len(outcome.item)
        if len(part) >= MAX_BATCH or size >= MAX_BYTES:
            yield part
            part, size = [], 0
    if part:
        yield part


def _call(domain: str, outcomes: Sequence[Outcome]) -> Call[Answers]:
    """Return the one call that records these endings, which are of one kind."""
    items = [outcome.item for outcome in outcomes]
    match outcomes[0].ending:
        case Completed():
            return _calls.complete(domain, items)
        case Failed():
            return _calls.fail(domain, items)
        case _:
            return _calls.release(domain, items)


def _fields(ending: Ending) -> str:
    match ending:
        case Completed(result=result):
            return f',"result":{result}'
        case Failed(kind, error, retry_in, max_attempts, _):
            return (
                f',"kind":"{kind}","error":{error},"retry_in":{retry_in.total_seconds()},"max_attempts":{max_attempts}'
            )
        case Released() | Recorded():
            return ""
