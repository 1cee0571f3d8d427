"""The subcommands of an operator that act: retry, cancel and complete, on ids or on all that a filter finds."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Annotated, TypeAlias
from uuid import UUID

import typer

from commandbus.bus import CommandBus
from commandbus.cli import terminal
from commandbus.cli.database import ask
from commandbus.cli.options import AsJson, Domain, Dsn, Operator, OptionalReason, Reason, read_json, spread
from commandbus.cli.parked import Choice, group_lines, nothing
from commandbus.errors import CommandNotFoundError, CommandStateError
from commandbus.model import BulkResult, TroubleshootingFilter
from commandbus.troubleshooting import TroubleshootingQueue

Ids: TypeAlias = Annotated[list[UUID] | None, typer.Argument(metavar="[ID...]", help="Without any: what is chosen.")]

_TELL_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class How:
    """The options of all verbs beside those that choose."""

    operator: Operator
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be acted on, and change nothing.")] = False
    count: Annotated[
        int | None,
        typer.Option(min=0, help="How many are chosen, as --dry-run tells; with another number nothing is done."),
    ] = None
    rate: Annotated[float | None, typer.Option(min=0.01, help="How many a second at most.")] = None
    dsn: Dsn = None
    as_json: AsJson = False


@dataclass(frozen=True, slots=True)
class _Verb:
    """What to do with one command, and with many; `done` is the word for it."""

    done: str
    one: Callable[..., Awaitable[None]]
    many: Callable[..., Awaitable[BulkResult]]


@spread
def retry(
    domain: Domain,
    command_ids: Ids = None,
    *,
    data: Annotated[
        str | None, typer.Option(help="New data for the command: JSON; `@file` reads a file, `-` stdin.")
    ] = None,
    patch: Annotated[str | None, typer.Option(help="A JSON merge patch of the data of all that are chosen.")] = None,
    reason: OptionalReason = None,
    choice: Choice,
    how: How,
) -> int:
    """Put parked commands back in line, with a full budget of attempts."""
    value = None if data is None else _read_some("--data", data)
    if data is not None and len(command_ids or ()) != 1:
        raise typer.BadParameter("new data is for one command: give one ID", param_hint="--data")
    change = None if patch is None else _read_some("--patch", patch)
    if patch is not None and command_ids:
        raise typer.BadParameter("goes without IDs: `edit` patches one command", param_hint="--patch")
    verb = _Verb(
        "retried",
        partial(TroubleshootingQueue.operator_retry, data=value, reason=reason),
        partial(TroubleshootingQueue.operator_retry_many, patch=change, reason=reason),
    )
    return _act(verb, command_ids, choice.of(domain), how)


@spread
def cancel(domain: Domain, command_ids: Ids = None, *, reason: Reason, choice: Choice, how: How) -> int:
    """Give parked commands up."""
    verb = _Verb(
        "canceled",
        partial(TroubleshootingQueue.operator_cancel, reason=reason),
        partial(TroubleshootingQueue.operator_cancel_many, reason=reason),
    )
    return _act(verb, command_ids, choice.of(domain), how)


@spread
def complete(
    domain: Domain,
    command_ids: Ids = None,
    *,
    reason: Reason,
    result: Annotated[str | None, typer.Option(help="Their result: JSON; `@file` reads a file, `-` stdin.")] = None,
    choice: Choice,
    how: How,
) -> int:
    """Note that the work of parked commands was done by hand."""
    value = None if result is None else read_json("--result", result)
    verb = _Verb(
        "completed",
        partial(TroubleshootingQueue.operator_complete, result_data=value, reason=reason),
        partial(TroubleshootingQueue.operator_complete_many, result_data=value, reason=reason),
    )
    return _act(verb, command_ids, choice.of(domain), how)


def _read_some(name: str, text: str) -> object:
    value = read_json(name, text)
    if value is None:
        raise typer.BadParameter("null cannot be a command's data", param_hint=name)
    return value


def _act(verb: _Verb, command_ids: list[UUID] | None, which: TroubleshootingFilter, how: How) -> int:
    if command_ids:
        if which != TroubleshootingFilter(which.domain) or how.dry_run or how.count is not None or how.rate is not None:
            raise typer.BadParameter("IDs go without --dry-run, --count, --rate and the options that choose commands")
        return _act_on_each(verb, command_ids, which.domain, how)
    if how.dry_run:
        return _preview(verb, which, how)
    if how.count is None:
        raise typer.BadParameter(
            "is needed to act on all that is chosen: --dry-run instead of it tells the number, and changes nothing",
            param_hint="--count",
        )
    return _act_on_many(verb, which, how.count, how)


def _act_on_each(verb: _Verb, command_ids: list[UUID], domain: str, how: How) -> int:
    """Act on one command after the other, and tell how each went; those that cannot be acted on hold up no other."""

    async def work(bus: CommandBus) -> int:
        failures = 0
        for command_id in command_ids:
            refusal = None
            try:
                await verb.one(TroubleshootingQueue(bus), domain, command_id, operator=how.operator)
            except (CommandNotFoundError, CommandStateError) as error:
                failures += 1
                refusal = str(error)
                terminal.complain(refusal)
            if how.as_json:
                outcome = verb.done if refusal is None else "refused"
                terminal.print_json(
                    {"domain": domain, "command_id": command_id, "outcome": outcome, "message": refusal}
                )
            elif refusal is None:
                terminal.say(f"{verb.done} {command_id}")
        return int(failures > 0)

    return ask(how.dsn, work)


def _preview(verb: _Verb, which: TroubleshootingFilter, how: How) -> int:
    preview = ask(how.dsn, lambda bus: TroubleshootingQueue(bus).preview(which))
    if how.as_json:
        terminal.print_json(preview)
    elif not preview.count:
        terminal.say(nothing(which))
    else:
        terminal.print_entries(f"{preview.count:,} would be {verb.done}", map(group_lines, preview.groups))
        terminal.say(f"to do it: --count {preview.count} instead of --dry-run")
    return 0


def _act_on_many(verb: _Verb, which: TroubleshootingFilter, count: int, how: How) -> int:
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
            how.dsn,
            lambda bus: verb.many(
                TroubleshootingQueue(bus),
                which,
                expected_count=count,
                per_second=how.rate,
                operator=how.operator,
                on_progress=tell,
            ),
        )
    except BaseException:
        if how.as_json and latest is not None:
            terminal.print_json(latest)
        raise
    if how.as_json:
        terminal.print_json(result)
    else:
        terminal.say(f"{verb.done} {result.done:,}")
    if result.changed:
        terminal.complain(f"{result.changed:,} were left alone: they are no longer parked, or parked anew")
    if result.refused:
        terminal.complain(f"{result.refused:,} were left alone: with the patch their data would break a limit")
    if result.busy:
        terminal.complain(f"{result.busy:,} were left alone: another transaction keeps them locked; try again")
    return int(result.done < count)
