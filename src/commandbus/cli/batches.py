"""The subcommands about batches: list, show, watch, cancel, retry."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from datetime import timedelta
from typing import Annotated, TypeAlias
from uuid import UUID

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from commandbus.bus import CommandBus
from commandbus.cli import terminal
from commandbus.cli.database import ask, on_bus, until_stopped
from commandbus.cli.desk import OfDomain
from commandbus.cli.options import Acting, AsJson, Cursor, Domain, Dsn, Limit, OptionalReason, Reason, spread
from commandbus.model import Batch, BulkResult

BatchId: TypeAlias = Annotated[UUID, typer.Argument(metavar="BATCH")]

_COUNTS = ("total", "completed", "failed", "canceled", "in_trouble", "open")
_INTERVAL = timedelta(seconds=0.5)


def list_batches(
    *,
    domain: OfDomain = None,
    finished: Annotated[
        bool | None, typer.Option("--finished/--unfinished", help="Only those that have ended, or have not.")
    ] = None,
    limit: Limit = 100,
    cursor: Cursor = None,
    dsn: Dsn = None,
    as_json: AsJson = False,
) -> None:
    """List batches with their counts, the newest first."""
    page = ask(dsn, lambda bus: bus.list_batches(domain=domain, finished=finished, limit=limit, cursor=cursor))
    terminal.print_page(page, _lines, "no such batches", as_json=as_json)


def _lines(batch: Batch) -> tuple[list[object], list[object]]:
    return [batch.created_at, batch.domain, batch.batch_id, batch.name, _state(batch)], [_told(batch)]


def show(domain: Domain, batch_id: BatchId, *, dsn: Dsn = None, as_json: AsJson = False) -> None:
    """Show a batch and its counts."""
    batch = ask(dsn, lambda bus: bus.get_batch(domain, batch_id))
    if as_json:
        terminal.print_json(_fields(batch))
    else:
        terminal.print_record(terminal.fields(batch) | {"progress": f"{batch.progress:.1%}"})


def watch(domain: Domain, batch_id: BatchId, *, dsn: Dsn = None, as_json: AsJson = False) -> None:
    """Show how far a batch is until it has ended: a bar, without a terminal a line for each change, or JSON."""
    with until_stopped():
        if as_json or not sys.stdout.isatty():
            tell = (lambda batch: terminal.print_json(_fields(batch))) if as_json else _print_line
            asyncio.run(on_bus(dsn, lambda bus: _watch(bus, domain, batch_id, tell), "commandbus cli"))
        else:
            _watch_as_bar(dsn, domain, batch_id)


async def _watch(bus: CommandBus, domain: str, batch_id: UUID, tell: Callable[[Batch], object]) -> None:
    async for batch in bus.watch_batch(domain, batch_id, interval=_INTERVAL):
        tell(batch)


def _watch_as_bar(dsn: str | None, domain: str, batch_id: UUID) -> None:
    columns = BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn()
    with Progress(*columns, console=Console()) as progress:
        bar = progress.add_task("", total=None)

        def tell(batch: Batch) -> None:
            ended = batch.completed + batch.failed + batch.canceled
            progress.update(bar, total=batch.total, completed=ended, description=terminal.safe(_state(batch)))

        asyncio.run(on_bus(dsn, lambda bus: _watch(bus, domain, batch_id, tell), "commandbus cli"))


@spread
def cancel(domain: Domain, batch_id: BatchId, *, reason: Reason, how: Acting) -> int:
    """End all commands of a batch that have not ended, and the batch with them."""
    result = ask(how.dsn, lambda bus: bus.cancel_batch(domain, batch_id, operator=how.operator, reason=reason))
    return _tell(how, result, "canceled", "ended meanwhile")


@spread
def retry(domain: Domain, batch_id: BatchId, *, reason: OptionalReason = None, how: Acting) -> int:
    """Put the parked commands of a batch back in line, with a full budget of attempts."""
    result = ask(how.dsn, lambda bus: bus.retry_batch(domain, batch_id, operator=how.operator, reason=reason))
    return _tell(how, result, "retried", "no longer parked, or parked anew")


def _tell(how: Acting, result: BulkResult, verb: str, changed: str) -> int:
    left = {changed: result.changed, "locked by somebody": result.busy}
    how.tell(result, ", ".join([f"{verb}: {result.done:,}", *(f"{n:,} {why}" for why, n in left.items() if n)]))
    return 1 if result.busy else 0


def _state(batch: Batch) -> str:
    return "finished" if batch.done else "growing" if batch.growing else f"{batch.progress:.0%}"


def _told(batch: Batch) -> str:
    return ", ".join(f"{getattr(batch, name):,} {name.replace('_', ' ')}" for name in _COUNTS)


def _fields(batch: Batch) -> dict[str, object]:
    return terminal.fields(batch) | {"done": batch.done, "progress": batch.progress}


def _print_line(batch: Batch) -> None:
    terminal.say(f"{_state(batch)}: {_told(batch)}")
