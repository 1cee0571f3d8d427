"""The subcommands about batches: list, show, watch, cancel, retry."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable
from dataclasses import asdict
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
from commandbus.cli.options import AsJson, Domain, Dsn, Operator, OptionalReason, Reason
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
    limit: Annotated[int, typer.Option(min=1, max=1000)] = 100,
    cursor: Annotated[str | None, typer.Option(help="The `next_cursor` of the page before.")] = None,
    dsn: Dsn = None,
    as_json: AsJson = False,
) -> None:
    """List batches with their counts, the newest first."""
    page = ask(dsn, lambda bus: bus.list_batches(domain=domain, finished=finished, limit=limit, cursor=cursor))
    if as_json:
        terminal.print_json(page)
        return
    if not page.items:
        terminal.say("no such batches")
    for batch in page:
        terminal.print_entry([batch.created_at, batch.domain, batch.batch_id, batch.name, _state(batch)], _told(batch))
    if page.next_cursor:
        terminal.say(f"there are more: --cursor {page.next_cursor}")


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


def cancel(
    domain: Domain, batch_id: BatchId, *, reason: Reason, operator: Operator, dsn: Dsn = None, as_json: AsJson = False
) -> int:
    """End all commands of a batch that have not ended, and the batch with them."""
    return _act(
        "canceled",
        "ended meanwhile",
        dsn,
        lambda bus: bus.cancel_batch(domain, batch_id, operator=operator, reason=reason),
        as_json,
    )


def retry(
    domain: Domain,
    batch_id: BatchId,
    *,
    reason: OptionalReason = None,
    operator: Operator,
    dsn: Dsn = None,
    as_json: AsJson = False,
) -> int:
    """Put the parked commands of a batch back in line, with a full budget of attempts."""
    return _act(
        "retried",
        "no longer parked, or parked anew",
        dsn,
        lambda bus: bus.retry_batch(domain, batch_id, operator=operator, reason=reason),
        as_json,
    )


def _act(
    verb: str, changed: str, dsn: str | None, work: Callable[[CommandBus], Awaitable[BulkResult]], as_json: bool
) -> int:  # noqa: FBT001
    result = ask(dsn, work)
    if as_json:
        terminal.print_json(asdict(result))
    else:
        left = {changed: result.changed, "locked by somebody": result.busy}
        terminal.say(", ".join([f"{verb}: {result.done:,}", *(f"{n:,} {why}" for why, n in left.items() if n)]))
    return 1 if result.busy else 0


def _state(batch: Batch) -> str:
    return "finished" if batch.done else "growing" if batch.growing else f"{batch.progress:.0%}"


def _told(batch: Batch) -> list[object]:
    return [", ".join(f"{getattr(batch, name):,} {name.replace('_', ' ')}" for name in _COUNTS)]


def _fields(batch: Batch) -> dict[str, object]:
    return terminal.fields(batch) | {"done": batch.done, "progress": batch.progress}


def _print_line(batch: Batch) -> None:
    terminal.say(f"{_state(batch)}: {_told(batch)[0]}")
