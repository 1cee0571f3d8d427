"""The subcommands of an operator that act: retry, cancel and complete, on ids or on all that a filter finds."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Annotated, TypeAlias
from uuid import UUID

import typer

from commandbus.bus import CommandBus
from commandbus.cli import terminal
from commandbus.cli.database import ask
from commandbus.cli.options import AsJson, Domain, Dsn, Operator, Reason, operator_name, read_json
from commandbus.cli.parked import (
    Code,
    Group,
    OptionalReason,
    ParkedFor,
    Text,
    Type,
    chosen,
    group_lines,
    say_nothing,
)
from commandbus.errors import CommandNotFoundError, CommandStateError
from commandbus.model import BulkResult, TroubleshootingFilter
from commandbus.troubleshooting import TroubleshootingQueue

Ids: TypeAlias = Annotated[list[UUID] | None, typer.Argument(metavar="[ID...]", help="Without any: what is chosen.")]
DryRun: TypeAlias = Annotated[bool, typer.Option("--dry-run", help="Say what would be acted on, and change nothing.")]
Count: TypeAlias = Annotated[
    int | None,
    typer.Option(min=0, help="How many are chosen, as --dry-run tells; with another number nothing is done."),
]
Rate: TypeAlias = Annotated[float | None, typer.Option(min=0.01, help="How many a second at most.")]

_TELL_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class _Verb:
    """What to do with one command, and with many; `done` is the word for it."""

    done: str
    one: Callable[[TroubleshootingQueue, UUID], Awaitable[None]]
    many: Callable[..., Awaitable[BulkResult]]


def retry(
    domain: Domain,
    command_ids: Ids = None,
    *,
    data: Annotated[
        str | None, typer.Option(help="New data for the command: JSON; `@file` reads a file, `-` stdin.")
    ] = None,
    patch: Annotated[str | None, typer.Option(help="A JSON merge patch of the data of all that are chosen.")] = None,
    operator: Operator = None,
    reason: OptionalReason = None,
    command_type: Type = None,
    code: Code = None,
    group: Group = None,
    parked_for: ParkedFor = None,
    text: Text = None,
    dry_run: DryRun = False,
    count: Count = None,
    rate: Rate = None,
    dsn: Dsn = None,
    as_json: AsJson = False,
) -> int:
    """Put parked commands back in line, with a full budget of attempts."""
    ids = command_ids or []
    value = None if data is None else _read_some("--data", data)
    if data is not None and len(ids) != 1:
        raise typer.BadParameter("new data is for one command: give one ID", param_hint="--data")
    change = None if patch is None else _read_some("--patch", patch)
    if patch is not None and ids:
        raise typer.BadParameter("goes without IDs: `edit` patches one command", param_hint="--patch")
    name = operator_name(operator)
    verb = _Verb(
        "retried",
        lambda queue, command_id: queue.operator_retry(domain, command_id, data=value, operator=name, reason=reason),
        lambda queue, which, **how: queue.operator_retry_many(which, patch=change, operator=name, reason=reason, **how),
    )
    which = chosen(domain, command_type, code, group, parked_for, text)
    return _act(verb, ids, which, dry_run=dry_run, count=count, rate=rate, dsn=dsn, as_json=as_json)


def cancel(
    domain: Domain,
    command_ids: Ids = None,
    *,
    reason: Reason,
    operator: Operator = None,
    command_type: Type = None,
    code: Code = None,
    group: Group = None,
    parked_for: ParkedFor = None,
    text: Text = None,
    dry_run: DryRun = False,
    count: Count = None,
    rate: Rate = None,
    dsn: Dsn = None,
    as_json: AsJson = False,
) -> int:
    """Give parked commands up."""
    name = operator_name(operator)
    verb = _Verb(
        "canceled",
        lambda queue, command_id: queue.operator_cancel(domain, command_id, operator=name, reason=reason),
        lambda queue, which, **how: queue.operator_cancel_many(which, operator=name, reason=reason, **how),
    )
    which = chosen(domain, command_type, code, group, parked_for, text)
    return _act(verb, command_ids or [], which, dry_run=dry_run, count=count, rate=rate, dsn=dsn, as_json=as_json)


def complete(
    domain: Domain,
    command_ids: Ids = None,
    *,
    reason: Reason,
    result: Annotated[str | None, typer.Option(help="Their result: JSON; `@file` reads a file, `-` stdin.")] = None,
    operator: Operator = None,
    command_type: Type = None,
    code: Code = None,
    group: Group = None,
    parked_for: ParkedFor = None,
    text: Text = None,
    dry_run: DryRun = False,
    count: Count = None,
    rate: Rate = None,
    dsn: Dsn = None,
    as_json: AsJson = False,
) -> int:
    """Note that the work of parked commands was done by hand."""
    value = None if result is None else read_json("--result", result)
    name = operator_name(operator)
    verb = _Verb(
        "completed",
        lambda queue, command_id: queue.operator_complete(
            domain, command_id, result_data=value, operator=name, reason=reason
        ),
        lambda queue, which, **how: queue.operator_complete_many(
            which, result_data=value, operator=name, reason=reason, **how
        ),
    )
    which = chosen(domain, command_type, code, group, parked_for, text)
    return _act(verb, command_ids or [], which, dry_run=dry_run, count=count, rate=rate, dsn=dsn, as_json=as_json)


def _read_some(name: str, text: str) -> object:
    value = read_json(name, text)
    if value is None:
        raise typer.BadParameter("null cannot be a command's data", param_hint=name)
    return value


def _act(
    verb: _Verb,
    command_ids: list[UUID],
    which: TroubleshootingFilter,
    *,
    dry_run: bool,
    count: int | None,
    rate: float | None,
    dsn: str | None,
    as_json: bool,
) -> int:
    if command_ids:
        if which != TroubleshootingFilter(which.domain) or dry_run or count is not None or rate is not None:
            raise typer.BadParameter("IDs go without --dry-run, --count, --rate and the options that choose commands")
        return _act_on_each(verb, command_ids, which.domain, dsn, as_json=as_json)
    if dry_run:
        return _preview(verb, which, dsn, as_json=as_json)
    if count is None:
        raise typer.BadParameter(
            "is needed to act on all that is chosen: --dry-run instead of it tells the number, and changes nothing",
            param_hint="--count",
        )
    return _act_on_many(verb, which, count, rate, dsn, as_json=as_json)


def _act_on_each(verb: _Verb, command_ids: list[UUID], domain: str, dsn: str | None, *, as_json: bool) -> int:
    """Act on one command after the other, and tell how each went; those that cannot be acted on hold up no other."""

    async def work(bus: CommandBus) -> int:
        failures = 0
        for command_id in command_ids:
            refusal = None
            try:
                await verb.one(TroubleshootingQueue(bus), command_id)
            except (CommandNotFoundError, CommandStateError) as error:
                failures += 1
                refusal = str(error)
                terminal.complain(refusal)
            if as_json:
                outcome = verb.done if refusal is None else "refused"
                terminal.print_json(
                    {"domain": domain, "command_id": command_id, "outcome": outcome, "message": refusal}
                )
            elif refusal is None:
                terminal.say(f"{verb.done} {command_id}")
        return int(failures > 0)

    return ask(dsn, work)


def _preview(verb: _Verb, which: TroubleshootingFilter, dsn: str | None, *, as_json: bool) -> int:
    preview = ask(dsn, lambda bus: TroubleshootingQueue(bus).preview(which))
    if as_json:
        terminal.print_json(preview)
    elif not preview.count:
        say_nothing(which)
    else:
        terminal.print_entries(f"{preview.count:,} would be {verb.done}", map(group_lines, preview.groups))
        terminal.say(f"to do it: --count {preview.count} instead of --dry-run")
    return 0


def _act_on_many(
    verb: _Verb, which: TroubleshootingFilter, count: int, rate: float | None, dsn: str | None, *, as_json: bool
) -> int:
    latest: BulkResult | None = None
    told_at = time.monotonic()

    def tell(so_far: BulkResult) -> None:
        nonlocal latest, told_at
        latest = so_far
        if so_far.remaining and time.monotonic() - told_at >= _TELL_SECONDS:
            told_at = time.monotonic()
            terminal.remark(f"{verb.done} {so_far.done:,} of {count:,}")

    try:
        result = ask(
            dsn,
            lambda bus: verb.many(
                TroubleshootingQueue(bus), which, expected_count=count, per_second=rate, on_progress=tell
            ),
        )
    except BaseException:
        if as_json and latest is not None:
            terminal.print_json(latest)
        raise
    if as_json:
        terminal.print_json(result)
    else:
        terminal.say(f"{verb.done} {result.done:,}")
    if result.changed:
        terminal.complain(f"{result.changed:,} were left alone: they are no longer parked, or parked anew")
    if result.busy:
        terminal.complain(f"{result.busy:,} were left alone: another transaction keeps them locked; try again")
    return int(result.done < count)
