"""The subcommands of the troubleshooting queue: list, retry, cancel, complete."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Annotated
from uuid import UUID

import typer

from commandbus.bus import CommandBus
from commandbus.cli import terminal
from commandbus.cli.database import ask
from commandbus.cli.options import AsJson, Domain, Dsn, Ids, Operator, Reason, operator_name, read_json
from commandbus.errors import CommandNotFoundError, CommandStateError
from commandbus.model import Command
from commandbus.troubleshooting import TroubleshootingQueue


def list_parked(
    domain: Domain,
    *,
    command_type: Annotated[str | None, typer.Option("--type", help="Only this command type.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=1000)] = 100,
    cursor: Annotated[str | None, typer.Option(help="The `next_cursor` of the page before.")] = None,
    dsn: Dsn = None,
    as_json: AsJson = False,
) -> None:
    """List parked commands with their errors, the longest parked first."""
    page = ask(
        dsn,
        lambda bus: TroubleshootingQueue(bus).list_troubleshooting(
            domain, command_type=command_type, limit=limit, cursor=cursor
        ),
    )
    if as_json:
        terminal.print_json(page)
    elif not page.items:
        of_type = f' of type "{command_type}"' if command_type else ""
        terminal.say(f'nothing{of_type} is parked in "{domain}"')
    else:
        terminal.print_entries(f'parked in "{domain}"', map(_lines, page))
        if page.next_cursor:
            terminal.say(f"there are more: --cursor {page.next_cursor}")


def _lines(command: Command) -> tuple[list[object], list[object]]:
    numbers = (terminal.named("attempts", command.attempts), terminal.named("parked", command.parked_at))
    return [command.command_id, command.command_type, *numbers], [command.error]


def retry(
    domain: Domain,
    command_ids: Ids,
    *,
    data: Annotated[
        str | None, typer.Option(help="New data for the command: JSON; `@file` reads a file, `-` stdin.")
    ] = None,
    operator: Operator = None,
    reason: Annotated[str | None, typer.Option(help="Why; the audit trail keeps it.")] = None,
    dsn: Dsn = None,
    as_json: AsJson = False,
) -> int:
    """Put parked commands back in line, with a full budget of attempts."""
    value = None if data is None else read_json("--data", data)
    if data is not None and value is None:
        raise typer.BadParameter("null cannot be a command's data", param_hint="--data")
    if data is not None and len(command_ids) > 1:
        raise typer.BadParameter("new data is for one command: give one ID", param_hint="--data")
    name = operator_name(operator)

    def act(queue: TroubleshootingQueue, command_id: UUID) -> Awaitable[None]:
        return queue.operator_retry(domain, command_id, data=value, operator=name, reason=reason)

    return _act_on_each(dsn, domain, command_ids, "retried", act, as_json=as_json)


def cancel(
    domain: Domain,
    command_ids: Ids,
    *,
    reason: Reason,
    operator: Operator = None,
    dsn: Dsn = None,
    as_json: AsJson = False,
) -> int:
    """Give parked commands up."""
    name = operator_name(operator)

    def act(queue: TroubleshootingQueue, command_id: UUID) -> Awaitable[None]:
        return queue.operator_cancel(domain, command_id, operator=name, reason=reason)

    return _act_on_each(dsn, domain, command_ids, "canceled", act, as_json=as_json)


def complete(
    domain: Domain,
    command_ids: Ids,
    *,
    reason: Reason,
    result: Annotated[str | None, typer.Option(help="Their result: JSON; `@file` reads a file, `-` stdin.")] = None,
    operator: Operator = None,
    dsn: Dsn = None,
    as_json: AsJson = False,
) -> int:
    """Note that the work of parked commands was done by hand."""
    value = None if result is None else read_json("--result", result)
    name = operator_name(operator)

    def act(queue: TroubleshootingQueue, command_id: UUID) -> Awaitable[None]:
        return queue.operator_complete(domain, command_id, result_data=value, operator=name, reason=reason)

    return _act_on_each(dsn, domain, command_ids, "completed", act, as_json=as_json)


def _act_on_each(
    dsn: str | None,
    domain: str,
    command_ids: list[UUID],
    done: str,
    act: Callable[[TroubleshootingQueue, UUID], Awaitable[None]],
    *,
    as_json: bool,
) -> int:
    """Act on one command after the other, and tell how each went; those that cannot be acted on hold up no other."""

    async def work(bus: CommandBus) -> int:
        failures = 0
        for command_id in command_ids:
            refusal = None
            try:
                await act(TroubleshootingQueue(bus), command_id)
            except (CommandNotFoundError, CommandStateError) as error:
                failures += 1
                refusal = str(error)
                terminal.complain(refusal)
            if as_json:
                outcome = done if refusal is None else "refused"
                terminal.print_json(
                    {"domain": domain, "command_id": command_id, "outcome": outcome, "message": refusal}
                )
            elif refusal is None:
                terminal.say(f"{done} {command_id}")
        return int(failures > 0)

    return ask(dsn, work)
