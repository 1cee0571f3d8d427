"""The subcommands for single commands: send, show."""

from __future__ import annotations

from typing import Annotated, NamedTuple
from uuid import UUID

import typer

from commandbus import _queries
from commandbus.bus import CommandBus
from commandbus.cli import terminal
from commandbus.cli.database import ask
from commandbus.cli.options import AsJson, Domain, Dsn, duration, read_json
from commandbus.errors import CommandIdConflictError, CommandNotFoundError
from commandbus.model import AuditEvent, Command, Json, Waiting


def send(
    domain: Domain,
    command_type: Annotated[str, typer.Argument(metavar="TYPE")],
    data: Annotated[
        str, typer.Argument(metavar="DATA", help="JSON; `-` reads it from stdin, `@file` from a file.")
    ] = "{}",
    *,
    command_id: Annotated[
        UUID | None, typer.Option("--id", help="Makes the send idempotent: again with the same is no error.")
    ] = None,
    delay: Annotated[
        str | None, typer.Option(metavar="DURATION", help="Not before so long: 90, 90s, 5m, 1h, 2d.")
    ] = None,
    priority: Annotated[int, typer.Option(min=-100, max=100, help="Higher first.")] = 0,
    max_attempts: Annotated[int | None, typer.Option(min=1, help="Goes before the handler's policy.")] = None,
    correlation_id: str | None = None,
    reply_to: Annotated[str | None, typer.Option(help="A domain that replies go to.")] = None,
    header: Annotated[list[str] | None, typer.Option(metavar="KEY=VALUE", help="May be repeated.")] = None,
    dsn: Dsn = None,
    as_json: AsJson = False,
) -> None:
    """Send one command, and print its receipt once it is durable."""
    value = read_json("DATA", data)
    wait = None if delay is None else duration("--delay", delay)
    pairs = [text.partition("=") for text in header or ()]
    if not all(name and equals for name, equals, _ in pairs):
        raise typer.BadParameter("must be KEY=VALUE", param_hint="--header")
    receipt = ask(
        dsn,
        lambda bus: bus.send(
            domain,
            command_type,
            value,
            command_id=command_id,
            correlation_id=correlation_id,
            reply_to=reply_to,
            max_attempts=max_attempts,
            delay=wait,
            priority=priority,
            headers={name: text for name, _, text in pairs},
        ),
    )
    terminal.print_json(receipt) if as_json else terminal.print_record(terminal.fields(receipt))


def show(
    command_id: Annotated[UUID, typer.Argument(metavar="ID")],
    *,
    domain: Annotated[str | None, typer.Option(help="Default: the one that has this id.")] = None,
    dsn: Dsn = None,
    as_json: AsJson = False,
) -> None:
    """Show a command, why it waits, and everything that happened to it: each attempt, with its error."""
    story = ask(dsn, lambda bus: read_story(bus, command_id, domain))
    terminal.print_json(story._asdict()) if as_json else print_story(story)


class Story(NamedTuple):
    """All there is to tell of a command."""

    command: Command
    waiting: Waiting | None
    audit_trail: list[AuditEvent]


async def read_story(bus: CommandBus, command_id: UUID, domain: str | None) -> Story:
    """Read a command, by default from the domain that has it."""
    where = domain or await _find_domain(bus, command_id)
    command = await bus.get_command(where, command_id)
    return Story(command, await bus.explain(where, command_id), await bus.get_audit_trail(where, command_id))


def print_story(story: Story) -> None:
    """Print a command, why it waits, all there is to know of its error, and what happened to it."""
    command, waiting, events = story
    texts = {name: terminal.json_cell(getattr(command, name)) for name in ("data", "headers", "result")}
    terminal.print_record(terminal.fields(command) | texts | {"waiting": waiting})
    if command.error and command.error.details is not None:
        _print_details(command.error.details)
    terminal.print_entries("audit trail", map(_lines, events))


def _lines(event: AuditEvent) -> tuple[list[object], list[object]]:
    names = ("delivery", "attempt", "operator", "worker")
    return (
        [event.occurred_at, event.event, *(terminal.named(name, getattr(event, name)) for name in names)],
        [event.reason, event.error, terminal.json_cell(event.details)],
    )


def _print_details(details: Json) -> None:
    """Print the details of an error; a traceback, which the worker notes there, line by line."""
    if isinstance(details, dict) and isinstance(details.get("traceback"), str):
        terminal.print_quoted("traceback", details["traceback"])
        details = {name: value for name, value in details.items() if name != "traceback"}
    if details:
        terminal.print_quoted("error details", terminal.json_cell(details) or "")


async def _find_domain(bus: CommandBus, command_id: UUID) -> str:
    match await bus.database.repeat(_queries.find_domains(command_id)):
        case []:
            raise CommandNotFoundError(f"no command {command_id} in any domain")
        case [domain]:
            return domain
        case domains:
            raise CommandIdConflictError(
                f"command {command_id} is in several domains, choose one with --domain: {', '.join(domains)}",
                command_id,
            )
