"""The protocol of the operator's desk: what is parked, and what people do with commands."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from typing import TypeAlias
from uuid import UUID

from commandbus._calls import Answers, Call, Row
from commandbus._limits import text_problem
from commandbus._queries import COMMANDS, check_age, conditions, page, where_clause
from commandbus.errors import InvalidCommandError
from commandbus.model import Command, Page, TroubleshootingFilter, TroubleshootingGroup

_PARKED_PAGE = 5000

# -- reading -----------------------------------------------------------------------------------------------------------


def list_troubleshooting(which: TroubleshootingFilter, *, limit: int, cursor: str | None) -> Call[Page[Command]]:
    """Parked commands, the longest parked first."""
    where, params = _parked(which)
    read = datetime.fromisoformat
    parked = replace(COMMANDS, view="troubleshooting")
    return page(parked, where, params, by="parked_at", read=read, limit=limit, cursor=cursor)


def groups(which: TroubleshootingFilter) -> Call[list[TroubleshootingGroup]]:
    """Parked commands by type and kind of failure, the largest group first."""
    where, params = _parked(which)

    def read(row: Row) -> TroubleshootingGroup:
        fields = list(row)
        fields[7] = tuple(row[7])
        return TroubleshootingGroup(*fields)

    grouped = (
        "SELECT domain, command_type, coalesce(error ->> 'code', '') AS code, fingerprint, count(*) AS count, "
        "min(parked_at) AS oldest, max(parked_at) AS newest, "
        "(array_agg(command_id ORDER BY parked_at, command_id))[1:3] AS ids "
        f"FROM commandbus.troubleshooting{where_clause(where)} GROUP BY 1, 2, 3, 4"
    )
    return Call(
        f"SELECT g.*, coalesce(left(t.error ->> 'message', 300), '') FROM ({grouped}) g CROSS JOIN LATERAL ("
        "SELECT error FROM commandbus.troubleshooting WHERE domain = g.domain AND command_id = g.ids[1] LIMIT 1) t "
        "ORDER BY g.count DESC, g.command_type, g.code, g.fingerprint",
        tuple(params),
        lambda rows: [read(row) for row in rows],
    )


def fingerprint(domain: str, command_id: UUID) -> Call[str | None]:
    """Return the fingerprint of a parked command, None if it is not parked."""
    return Call(
        "SELECT fingerprint FROM commandbus.troubleshooting WHERE domain = %s AND command_id = %s LIMIT 1",
        (domain, command_id),
        lambda rows: str(rows[0][0]) if rows else None,
    )


Seen: TypeAlias = tuple[int, str]
"""A parked command before an edit: its delivery, and its data as `pretty` shows them."""


def parked_data(domain: str, command_id: UUID) -> Call[Seen | None]:
    """Read what is to be edited, None if the command is not parked."""
    return Call(
        "SELECT delivery, jsonb_pretty(data) FROM commandbus.troubleshooting "
        "WHERE domain = %s AND command_id = %s LIMIT 1",
        (domain, command_id),
        lambda rows: (rows[0][0], rows[0][1]) if rows else None,
    )


def pretty(text: str) -> Call[str]:
    """Write JSON text as PostgreSQL does, which keeps the digits of numbers."""
    return Call("SELECT jsonb_pretty(%s::jsonb)", (text,), lambda rows: str(rows[0][0]))


def edited(domain: str, command_id: UUID, delivery: int) -> Call[tuple[str, str]]:
    """Read the old and the new data of the edit that followed this delivery."""
    return Call(
        "SELECT jsonb_pretty(details -> 'old_data'), jsonb_pretty(details -> 'new_data') FROM commandbus.audit_trail "
        "WHERE domain = %s AND command_id = %s AND event = 'OPERATOR_RETRIED' AND delivery = %s",
        (domain, command_id, delivery),
        lambda rows: (rows[0][0], rows[0][1]),
    )


PageEnd: TypeAlias = tuple[datetime, UUID]
"""Where a page of parked commands ends."""


def parked_page(
    which: TroubleshootingFilter, until: datetime, after: PageEnd | None
) -> Call[tuple[list[Parked], PageEnd | None]]:
    """A page of what was parked up to this moment, the longest parked first, and its end, None for the last page."""
    where, params = _parked(which, until)
    if after is not None:
        where.append("(parked_at, command_id) > (%s, %s)")
        params += after
    return Call(
        f"SELECT command_id, delivery, parked_at FROM commandbus.troubleshooting{where_clause(where)} "
        f"ORDER BY parked_at, command_id LIMIT {_PARKED_PAGE}",
        tuple(params),
        lambda rows: (
            [(row[0], row[1]) for row in rows],
            (rows[-1][2], rows[-1][0]) if len(rows) == _PARKED_PAGE else None,
        ),
    )


def _parked(which: TroubleshootingFilter, until: datetime | None = None) -> tuple[list[str], list[object]]:
    """Return the conditions of a filter; with `until`, `parked_for` counts back from there, otherwise from now."""
    where, params = conditions(which.domain, command_type=which.command_type)
    exact = {"error ->> 'code'": which.error_code, "fingerprint": which.fingerprint, "batch_id": which.batch_id}
    for column, value in exact.items():
        if value is not None:
            where.append(f"{column} = %s")
            params.append(value)
    if until is not None or which.parked_for is not None:
        where.append("parked_at <= coalesce(%s, (SELECT commandbus.clock())) - %s")
        age = which.parked_for or timedelta(0)
        check_age("parked_for", age)
        params += [until, age]
    if which.text is not None:
        where.append("strpos(lower(concat_ws(E'\\n', error ->> 'message', data::text)), lower(%s)) > 0")
        params.append(which.text)
    return where, params


# -- acting ------------------------------------------------------------------------------------------------------------


def cancel(domain: str, command_id: UUID, operator: str | None, reason: str | None) -> Call[None]:
    """End any unfinished command."""
    return _act("cancel_v1", domain, command_id, operator, reason)


def operator_retry(domain: str, command_id: UUID, operator: str, reason: str | None, data: str | None) -> Call[None]:
    """Put a parked command back, perhaps with new data (JSON text)."""
    return _act("operator_retry_v1", domain, command_id, operator, reason, data)


def operator_cancel(domain: str, command_id: UUID, operator: str, reason: str) -> Call[None]:
    """End a parked command as CANCELED."""
    return _act("operator_cancel_v1", domain, command_id, operator, reason)


def operator_complete(domain: str, command_id: UUID, operator: str, reason: str, result: str | None) -> Call[None]:
    """End a parked command as COMPLETED with this result (JSON text)."""
    return _act("operator_complete_v1", domain, command_id, operator, reason, result)


def _act(
    name: str, domain: str, command_id: UUID, operator: str | None, reason: str | None, *more: str | None
) -> Call[None]:
    check_words(f"command {command_id}: ", operator, reason)
    params = (domain, command_id, operator, reason, *more)
    return Call(f"SELECT commandbus.{name}({', '.join('%s' for _ in params)})", params, lambda _: None)


def check_words(what: str, operator: object, reason: object) -> None:
    """Raise `InvalidCommandError` for a name or a reason that cannot be kept."""
    for field, text in (("operator", operator), ("reason", reason)):
        if text is not None and not isinstance(text, str):
            raise InvalidCommandError(f"{what}{field} must be a string")
        if text is not None and (problem := text_problem(text)) is not None:
            raise InvalidCommandError(f"{what}{field} {problem}")


Parked: TypeAlias = tuple[UUID, int]
"""A parked command as it was seen: its id, and its delivery, which is higher once it is parked anew."""


def operator_bulk(
    domain: str, verb: str, items: Sequence[Parked], *, operator: str, reason: str | None, value: str | None
) -> Call[Answers]:
    """Retry, replace, cancel or complete these; see `operator_bulk_v1`. Returns the outcome of each."""
    check_words("", operator, reason)
    text = ",".join(f'{{"command_id":"{command_id}","delivery":{delivery}}}' for command_id, delivery in items)
    return Call(
        "SELECT command_id, outcome FROM commandbus.operator_bulk_v1(%s, %s, %s, %s, %s, %s)",
        (domain, verb, f"[{text}]", operator, reason, value),
        lambda rows: dict(rows),  # noqa: PLW0108 - `dict` alone has too many types
    )
