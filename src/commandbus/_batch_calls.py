"""The part of the protocol that is about batches: see `sql/functions/batch.sql`."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from uuid import UUID

from commandbus._calls import Answers, Call, Row, as_text
from commandbus._desk_calls import Parked
from commandbus._queries import COMMANDS, Source, conditions, page
from commandbus.errors import BatchNotFoundError
from commandbus.model import Batch, Command, CommandStatus, Page, Receipt

_OPEN_PAGE = 5000

_COLUMNS = (
    "domain, batch_id, name, total, completed, failed, canceled, in_trouble, open, growing, created_at, finished_at, "
    "on_complete_domain, on_complete_id"
)


def _batch(row: Row) -> Batch:
    *fields, domain, command_id = map(as_text, row)
    fields.append(None if command_id is None else Receipt(domain, command_id))
    return Batch(*fields)


_BATCHES = Source("batches", _COLUMNS, _batch, "batch_id")
_BATCH_COMMANDS = Source("batch_commands", COMMANDS.columns, COMMANDS.read, "command_id")


def create(domain: str, batch_id: UUID, name: str | None, on_complete: str | None, digest: str) -> Call[str]:
    """Create an empty batch that grows: accepted, duplicate or conflict. See `create_batch_v1`."""
    return Call(
        "SELECT commandbus.create_batch_v1(%s, %s, %s, %s, %s)",
        (domain, batch_id, name, on_complete, digest),
        lambda rows: as_text(rows[0][0]),
    )


def add(domain: str, batch_id: UUID, commands: Sequence[str]) -> Call[list[str]]:
    """Send these into a batch; their outcomes in order, as of a send. See `add_to_batch_v1`."""
    return Call(
        "SELECT outcome FROM commandbus.add_to_batch_v1(%s, %s, %s)",
        (domain, batch_id, f"[{','.join(commands)}]"),
        lambda rows: [as_text(row[0]) for row in rows],
    )


def close(domain: str, batch_id: UUID) -> Call[None]:
    """Let a batch finish. See `close_batch_v1`."""
    return Call("SELECT commandbus.close_batch_v1(%s, %s)", (domain, batch_id), lambda _: None)


def cancel_bulk(domain: str, items: Sequence[Parked], operator: str | None, reason: str | None) -> Call[Answers]:
    """Cancel these. See `cancel_bulk_v1`."""
    text = ",".join(f'{{"command_id":"{command_id}"}}' for command_id, _ in items)
    return Call(
        "SELECT command_id, outcome FROM commandbus.cancel_bulk_v1(%s, %s, %s, %s)",
        (domain, f"[{text}]", operator, reason),
        lambda rows: dict(rows),  # noqa: PLW0108 - `dict` alone has too many types
    )


def get_batch(domain: str, batch_id: UUID) -> Call[Batch]:
    """Read one batch. Raises `BatchNotFoundError`."""

    def read(rows: list[Row]) -> Batch:
        if not rows:
            raise BatchNotFoundError(f'no batch {batch_id} in domain "{domain}"')
        return _batch(rows[0])

    sql = f"SELECT {_COLUMNS} FROM commandbus.batches WHERE domain = %s AND batch_id = %s"
    return Call(sql, (domain, batch_id), read)


def list_batches(domain: str | None, *, finished: bool | None, limit: int, cursor: str | None) -> Call[Page[Batch]]:
    """Read a page of batches, the newest first."""
    where, params = conditions(domain)
    if finished is not None:
        where.append(f"finished_at IS {'NOT ' if finished else ''}NULL")
    read = datetime.fromisoformat
    return page(_BATCHES, where, params, by="created_at", read=read, backwards=True, limit=limit, cursor=cursor)


def list_batch_commands(
    domain: str, batch_id: UUID, *, status: CommandStatus | None, limit: int, cursor: str | None
) -> Call[Page[Command]]:
    """Read a page of the commands of a batch, in the order in which they were given."""
    where, params = conditions(domain, status)
    where.append("batch_id = %s")
    params.append(batch_id)
    return page(_BATCH_COMMANDS, where, params, by="position", read=int, limit=limit, cursor=cursor)


def open_page(domain: str, batch_id: UUID, after: int) -> Call[tuple[list[Parked], int | None]]:
    """Return a page of the commands of a batch that have not ended, and where it ends, None for the last page."""
    return Call(
        "SELECT command_id, delivery, position FROM commandbus.batch_commands WHERE domain = %s AND batch_id = %s "
        f"AND position > %s AND finished_at IS NULL ORDER BY position LIMIT {_OPEN_PAGE}",
        (domain, batch_id, after),
        lambda rows: ([(row[0], row[1]) for row in rows], rows[-1][2] if len(rows) == _OPEN_PAGE else None),
    )
