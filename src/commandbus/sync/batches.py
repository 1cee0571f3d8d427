"""The blocking half of batches."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Coroutine, Iterator, Sequence
from dataclasses import replace
from datetime import timedelta
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar
from uuid import UUID

from commandbus._connections import run_on
from commandbus.batches import pause_of
from commandbus.bus import CommandBus
from commandbus.model import Batch, BulkResult, Command, CommandStatus, Page, SendRequest
from commandbus.sync.runtime import SyncRuntime

P = ParamSpec("P")
T = TypeVar("T")


class _Bus(Protocol):
    """What batches need of their bus."""

    runtime: SyncRuntime

    def _local(self) -> CommandBus: ...

    def _wake_soon(self, domains: Collection[str]) -> None: ...

    def _call(
        self, function: Callable[Concatenate[CommandBus, P], Coroutine[Any, Any, T]], *args: P.args, **more: P.kwargs
    ) -> T: ...

    def get_batch(self, domain: str, batch_id: UUID) -> Batch: ...


class SyncBatches:
    """The part of `SyncCommandBus` that is about batches."""

    def create_batch(
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
        """Send commands of one domain, all or none, and count them together; see `CommandBus.create_batch`."""
        if connection is not None:
            self.runtime.check("CommandBus.create_batch")
            _, make = self._local().creating(
                domain, commands, name=name, on_complete=on_complete, batch_id=batch_id, growing=growing
            )
            return run_on(connection, replace(make(), wake=self._wake_soon))
        return self._call(
            CommandBus.create_batch,
            domain,
            commands,
            name=name,
            on_complete=on_complete,
            batch_id=batch_id,
            growing=growing,
        )

    def add_to_batch(self: _Bus, domain: str, batch_id: UUID, commands: Sequence[SendRequest]) -> Batch:
        """Send more commands into a batch that grows, all or none; see `CommandBus.add_to_batch`."""
        return self._call(CommandBus.add_to_batch, domain, batch_id, commands)

    def close_batch(self: _Bus, domain: str, batch_id: UUID) -> Batch:
        """Let a batch finish that has grown: no more can be added; see `CommandBus.close_batch`."""
        return self._call(CommandBus.close_batch, domain, batch_id)

    def get_batch(self: _Bus, domain: str, batch_id: UUID) -> Batch:
        """Return a batch with its counts. Raises `BatchNotFoundError`."""
        return self._call(CommandBus.get_batch, domain, batch_id)

    def list_batches(
        self: _Bus,
        *,
        domain: str | None = None,
        finished: bool | None = None,
        limit: int = 100,
        cursor: str | None = None,
    ) -> Page[Batch]:
        """Return a page of batches, the newest first; see `CommandBus.list_batches`."""
        return self._call(CommandBus.list_batches, domain=domain, finished=finished, limit=limit, cursor=cursor)

    def list_batch_commands(
        self: _Bus,
        domain: str,
        batch_id: UUID,
        *,
        status: CommandStatus | None = None,
        limit: int = 100,
        cursor: str | None = None,
    ) -> Page[Command]:
        """Return a page of the commands of a batch, in the order in which they were given."""
        return self._call(CommandBus.list_batch_commands, domain, batch_id, status=status, limit=limit, cursor=cursor)

    def watch_batch(
        self: _Bus, domain: str, batch_id: UUID, *, interval: timedelta = timedelta(seconds=1)
    ) -> Iterator[Batch]:
        """Iterate over a batch as it is now and whenever it has changed; see `CommandBus.watch_batch`."""
        pause = pause_of(interval)
        seen = None
        while True:
            batch = self.get_batch(domain, batch_id)
            if batch != seen:
                seen = batch
                yield batch
            if batch.done:
                return
            time.sleep(pause)  # also after a change: a batch that drains changes all the time

    def cancel_batch(
        self: _Bus, domain: str, batch_id: UUID, *, operator: str | None = None, reason: str | None = None
    ) -> BulkResult:
        """Close a batch, and end all its commands that have not ended as `CANCELED`; see `CommandBus.cancel_batch`."""
        return self._call(CommandBus.cancel_batch, domain, batch_id, operator=operator, reason=reason)

    def retry_batch(self: _Bus, domain: str, batch_id: UUID, *, operator: str, reason: str | None = None) -> BulkResult:
        """Put all commands of a batch back that are parked by now; see `CommandBus.retry_batch`."""
        return self._call(CommandBus.retry_batch, domain, batch_id, operator=operator, reason=reason)
