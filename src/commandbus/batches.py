"""The batches of a bus: commands that are counted together, and one that is sent when the last of them has ended."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from dataclasses import replace
from datetime import timedelta
from functools import partial
from hashlib import sha256
from typing import Protocol, TypeVar
from uuid import UUID

import psycopg

from commandbus import _batch_calls, _desk_calls
from commandbus._bulk import LONG_SECONDS, Bulk, Pace, parked
from commandbus._calls import Outgoing
from commandbus._chunks import chunks
from commandbus._connections import Steps, Work, arun_on
from commandbus._database import Database, DeadlineError
from commandbus._desk_calls import check_words
from commandbus._failures import brief, is_connection_lost, is_unavailable, refusals_of
from commandbus._ids import new_id
from commandbus._limits import shown
from commandbus.errors import (
    CommandIdConflictError,
    ConfigurationError,
    DatabaseUnavailableError,
    InvalidCommandError,
    OutcomeUnknownError,
)
from commandbus.model import Batch, BulkResult, Command, CommandStatus, Page, SendRequest, TroubleshootingFilter

T = TypeVar("T")

_TRIES = 3
_MAX_NAME = 256


class _Bus(Protocol):
    """What batches need of their bus."""

    @property
    def database(self) -> Database: ...

    def _outgoing(self, request: SendRequest) -> Outgoing: ...

    def _wake_soon(self, domains: Collection[str]) -> None: ...

    async def wake(self, *domains: str) -> None: ...

    async def get_batch(self, domain: str, batch_id: UUID) -> Batch: ...

    def creating(
        self,
        domain: str,
        commands: Sequence[SendRequest],
        *,
        name: str | None,
        on_complete: SendRequest | None,
        batch_id: UUID | None,
        growing: bool,
    ) -> tuple[UUID, Callable[[], Work[Batch]]]: ...

    async def _in_own_transaction(
        self, batch_id: UUID, make: Callable[[], Work[Batch]], *, tries: int = ...
    ) -> Batch: ...


class Batches:
    """The part of `CommandBus` that is about batches."""

    async def create_batch(
        self: _Bus,
        domain: str,
        commands: Sequence[SendRequest],
        *,
        name: str | None = None,
        on_complete: SendRequest | None = None,
        batch_id: UUID | None = None,
        growing: bool = False,
        connection: object = None,
    ) -> Batch:
        """Send commands of one domain, all or none, and count them together. Durable when this returns.

        `on_complete`, of any domain, is sent once: in the transaction that ends the last of them. Its id is made here;
        without a correlation id of its own it bears the batch's id as that. A batch that is `growing` takes more
        commands and does not finish before `close_batch`; an empty one that is not finishes at once.

        `batch_id` makes it idempotent: the same id with the same contents again is a batch with `duplicate=True`, and
        nothing is sent; with others it is a `CommandIdConflictError`. So is a command id that was sent before. With
        `connection`, as in `send`, it is part of your transaction. A hundred thousand commands take some seconds.

        Raises `InvalidCommandError`, `CommandIdConflictError`, `DatabaseUnavailableError` (nothing was sent),
        `OutcomeUnknownError` (create it again with its id).
        """
        made_id, make = self.creating(
            domain, commands, name=name, on_complete=on_complete, batch_id=batch_id, growing=growing
        )
        if connection is not None:
            return await arun_on(connection, make())
        return await self._in_own_transaction(made_id, make)

    async def add_to_batch(self: _Bus, domain: str, batch_id: UUID, commands: Sequence[SendRequest]) -> Batch:
        """Send more commands into a batch that grows, all or none. Durable when this returns.

        There is no `connection`: while a transaction that has added is open, the batch cannot be closed.
        Raises what `create_batch` raises, `BatchNotFoundError`, or `CommandStateError` when the batch is closed.
        """
        steps = _adding(domain, _id(batch_id), _all_of(domain, [self._outgoing(request) for request in commands]))
        work = Work(steps, self._wake_soon, frozenset([domain]), all_or_none=True)
        return await self._in_own_transaction(batch_id, lambda: work, tries=1)

    async def close_batch(self: _Bus, domain: str, batch_id: UUID) -> Batch:
        """Let a batch finish that has grown: no more can be added. Closing twice is allowed.

        Raises `BatchNotFoundError`, or `CommandStateError` when somebody adds to it for longer than five seconds.
        """
        await self.database.repeat(_batch_calls.close(domain, _id(batch_id)))
        return await self.get_batch(domain, batch_id)

    async def get_batch(self: _Bus, domain: str, batch_id: UUID) -> Batch:
        """Return a batch with its counts. Raises `BatchNotFoundError`."""
        return await self.database.repeat(_batch_calls.get_batch(domain, _id(batch_id)))

    async def list_batches(
        self: _Bus,
        *,
        domain: str | None = None,
        finished: bool | None = None,
        limit: int = 100,
        cursor: str | None = None,
    ) -> Page[Batch]:
        """Return a page of batches, the newest first; `finished`: only those that have, or have not."""
        call = _batch_calls.list_batches(domain, finished=finished, limit=limit, cursor=cursor)
        return await self.database.repeat(call)

    async def list_batch_commands(
        self: _Bus,
        domain: str,
        batch_id: UUID,
        *,
        status: CommandStatus | None = None,
        limit: int = 100,
        cursor: str | None = None,
    ) -> Page[Command]:
        """Return a page of the commands of a batch, in the order in which they were given, as long as they are kept."""
        call = _batch_calls.list_batch_commands(domain, _id(batch_id), status=status, limit=limit, cursor=cursor)
        return await self.database.repeat(call, LONG_SECONDS, long=True)

    async def watch_batch(
        self: _Bus, domain: str, batch_id: UUID, *, interval: timedelta = timedelta(seconds=1)
    ) -> AsyncIterator[Batch]:
        """Iterate over a batch as it is now and whenever it has changed, until it has finished.

        Looks every `interval`; what changes between two looks is seen as one change. Raises `BatchNotFoundError`.
        """
        pause = pause_of(interval)
        seen = None
        while True:
            batch = await self.get_batch(domain, batch_id)
            if batch != seen:
                seen = batch
                yield batch
            if batch.done:
                return
            await asyncio.sleep(pause)  # also after a change: one that drains changes all the time

    async def cancel_batch(
        self: _Bus, domain: str, batch_id: UUID, *, operator: str | None = None, reason: str | None = None
    ) -> BulkResult:
        """Close a batch, and end all its commands that have not ended as `CANCELED`; see `cancel`.

        Some hundreds at a time, each time durable: when it was interrupted, call it again.
        Raises `BatchNotFoundError`, or `CommandStateError` when somebody adds to it for longer than five seconds.
        """
        check_words(f"batch {_id(batch_id)}: ", operator, reason)
        first = _batch_calls.open_page(domain, batch_id, 0)
        # Who may not read them is refused before it is closed.
        await self.database.repeat(first, LONG_SECONDS, long=True)
        await self.database.repeat(_batch_calls.close(domain, batch_id))
        items, end = await self.database.repeat(first, LONG_SECONDS, long=True)
        while end is not None:
            call = _batch_calls.open_page(domain, batch_id, end)
            more, end = await self.database.repeat(call, LONG_SECONDS, long=True)
            items += more
        act = partial(_batch_calls.cancel_bulk, domain, operator=operator, reason=reason)
        return await Bulk(self, act, Pace(None), None).run(items)

    async def retry_batch(
        self: _Bus, domain: str, batch_id: UUID, *, operator: str, reason: str | None = None
    ) -> BulkResult:
        """Put all commands of a batch back that are parked by now; see `TroubleshootingQueue.operator_retry`.

        Some hundreds at a time, each time durable. Raises `BatchNotFoundError`.
        """
        await self.get_batch(domain, batch_id)
        items = await parked(self.database, TroubleshootingFilter(domain, batch_id=batch_id))
        act = partial(_desk_calls.operator_bulk, domain, "retry", operator=operator, reason=reason, value=None)
        return await Bulk(self, act, Pace(None), None, wake=domain).run(items)

    # -- what they are made of -----------------------------------------------------------------------------------------

    def creating(
        self: _Bus,
        domain: str,
        commands: Sequence[SendRequest],
        *,
        name: str | None,
        on_complete: SendRequest | None,
        batch_id: UUID | None,
        growing: bool,
    ) -> tuple[UUID, Callable[[], Work[Batch]]]:
        """Return the id of a new batch, and what makes the work of creating it; for the other parts of the library."""
        made_id = new_id() if batch_id is None else _id(batch_id)
        given: object = name
        if given is not None and (not isinstance(given, str) or not 0 < len(given) <= _MAX_NAME):
            raise InvalidCommandError(f"name is {shown(given)}: it must be a string of 1 to {_MAX_NAME} characters")
        everything = _all_of(domain, [self._outgoing(request) for request in commands])
        last = None if on_complete is None else self._outgoing(on_complete)
        if last is not None and not last.minted:
            raise InvalidCommandError("on_complete: its command_id is made when the batch is created: leave it out")
        digest = "" if batch_id is None else _digest(name, on_complete, commands, growing=growing)
        create = _batch_calls.create(domain, made_id, name, None if last is None else last.text, digest)

        def steps() -> Steps[Batch]:
            with refusals_of("the batch"):
                outcome = yield create
            if outcome == "conflict":
                raise CommandIdConflictError(
                    f'batch {made_id} is in domain "{domain}" already, with other contents: nothing was written; use '
                    "a new id",
                    made_id,
                )
            if outcome == "accepted":
                yield from _adding(domain, made_id, everything)
                if not growing:
                    yield _batch_calls.close(domain, made_id)
            batch: Batch = yield _batch_calls.get_batch(domain, made_id)
            # An id made for this call is known already only when its transaction was repeated.
            return replace(batch, duplicate=outcome == "duplicate" and batch_id is not None)

        domains = frozenset([domain] if last is None else [domain, last.domain])
        return made_id, lambda: Work(steps(), self._wake_soon, domains, all_or_none=True)

    async def _in_own_transaction(
        self: _Bus, batch_id: UUID, make: Callable[[], Work[Batch]], *, tries: int = _TRIES
    ) -> Batch:
        """Do it, and wake the workers."""

        async def do() -> Batch:
            work = make()
            batch = await self.database.run_steps(work.steps)
            work.wake(work.domains)
            return batch

        return await insist(do, f"batch {batch_id}", batch_id, tries=tries)


async def insist(do: Callable[[], Awaitable[T]], what: str, its_id: UUID, *, tries: int = _TRIES) -> T:
    """Do what may be done twice; anew when the connection breaks or PostgreSQL asks for it, for other parts as well.

    Raises `DatabaseUnavailableError` when nothing was done, `OutcomeUnknownError` when it may have been.
    """
    problem, maybe_done = "", False
    for _ in range(tries):
        try:
            return await do()
        except DatabaseUnavailableError:  # after a wait of its own
            if not maybe_done:
                raise
            break
        except psycopg.Error as error:
            if not (is_unavailable(error) or is_connection_lost(error)):
                raise
            problem, maybe_done = brief(error), maybe_done or is_connection_lost(error)
            if isinstance(error, DeadlineError):  # it goes on in the server, and would have company
                break
    if maybe_done:
        raise OutcomeUnknownError(f"{what} may or may not have been written: {problem}", its_id)
    raise DatabaseUnavailableError(f"PostgreSQL cannot do it now, nothing was done: {problem}")


def pause_of(interval: timedelta) -> float:
    """Return the seconds between two looks at a batch; for the other half. Raises `ConfigurationError`."""
    given: object = interval
    if not isinstance(given, timedelta) or given <= timedelta(0):
        raise ConfigurationError(f"interval is {shown(given)}: it must be a timedelta above zero")
    return given.total_seconds()


def _adding(domain: str, batch_id: UUID, everything: list[Outgoing]) -> Steps[Batch]:
    for chunk in chunks(everything):
        with refusals_of("the batch"):
            outcomes = yield _batch_calls.add(domain, batch_id, [one.row(minted=one.minted) for one in chunk])
        for one, outcome in zip(chunk, outcomes, strict=True):
            if outcome != "accepted":
                raise CommandIdConflictError(
                    f'command {one.command_id} was sent to "{domain}" before, and a batch takes new commands only: '
                    "nothing was written; use a new id",
                    one.command_id,
                )
    batch: Batch = yield _batch_calls.get_batch(domain, batch_id)
    return batch


def _all_of(domain: str, everything: list[Outgoing]) -> list[Outgoing]:
    for index, one in enumerate(everything):
        if one.domain != domain:
            raise InvalidCommandError(
                f'command {one.command_id}, number {index}, is of domain "{one.domain}": the batch is of "{domain}"'
            )
    return everything


def _digest(
    name: str | None, on_complete: SendRequest | None, commands: Sequence[SendRequest], *, growing: bool
) -> str:
    """Return a hash of what a batch is created with: of each command, id, type and data, as for a send."""
    told = sha256(json.dumps([name, growing]).encode())
    for one in (*commands, *([] if on_complete is None else [None, on_complete])):
        if one is None:
            told.update(b"then")
        else:
            data = json.dumps(one.data, sort_keys=True)
            told.update(json.dumps([str(one.command_id), one.domain, str(one.command_type), data]).encode())
    return told.hexdigest()


def _id(batch_id: object) -> UUID:
    if not isinstance(batch_id, UUID):
        raise InvalidCommandError(f"batch_id is {shown(batch_id)}: it must be a uuid.UUID")
    return batch_id
