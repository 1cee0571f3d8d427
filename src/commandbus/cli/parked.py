"""The subcommands that look at the troubleshooting queue."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Annotated
from uuid import UUID

import typer

from commandbus import _desk_calls
from commandbus.bus import CommandBus
from commandbus.cli import terminal
from commandbus.cli.commands import Story, print_story, read_story
from commandbus.cli.database import ask
from commandbus.cli.options import AsJson, Cursor, Domain, Dsn, Limit, duration, spread
from commandbus.errors import CommandStateError
from commandbus.model import Command, TroubleshootingFilter, TroubleshootingGroup
from commandbus.troubleshooting import TroubleshootingQueue


@dataclass(frozen=True, slots=True)
class Choice:
    """The options that choose parked commands."""

    command_type: Annotated[str | None, typer.Option("--type", help="Only this command type.")] = None
    error_code: Annotated[str | None, typer.Option("--code", help="Only this error code.")] = None
    fingerprint: Annotated[str | None, typer.Option("--group", help="Only this group, as `groups` names it.")] = None
    parked_for: Annotated[
        str | None, typer.Option(metavar="DURATION", help="Only what is parked for so long at least: 90s, 5m, 1h, 2d.")
    ] = None
    text: Annotated[str | None, typer.Option(help="Only with this text in the error's message or in the data.")] = None

    def of(self, domain: str) -> TroubleshootingFilter:
        """Return the filter that they make."""
        age = None if self.parked_for is None else duration("--parked-for", self.parked_for)
        return TroubleshootingFilter(domain, **asdict(self) | {"parked_for": age})


# -- looking -----------------------------------------------------------------------------------------------------------


@spread
def list_parked(
    domain: Domain,
    *,
    choice: Choice,
    limit: Limit = 100,
    cursor: Cursor = None,
    dsn: Dsn = None,
    as_json: AsJson = False,
) -> None:
    """List parked commands with their errors, the longest parked first."""
    which = choice.of(domain)
    call = _desk_calls.list_troubleshooting(which, limit=limit, cursor=cursor)
    page = ask(dsn, lambda bus: bus.database.repeat(call))
    terminal.print_page(page, _command_lines, nothing(which), title=f'parked in "{domain}"', as_json=as_json)


def _command_lines(command: Command) -> tuple[list[object], list[object]]:
    numbers = (terminal.named("attempts", command.attempts), terminal.named("parked", command.parked_at))
    return [command.command_id, command.command_type, *numbers], [command.error]


@spread
def groups(
    domain: Domain,
    *,
    choice: Choice,
    dsn: Dsn = None,
    as_json: AsJson = False,
) -> None:
    """Group parked commands by type, error code and kind of message, the largest group first."""
    which = choice.of(domain)
    preview = ask(dsn, lambda bus: TroubleshootingQueue(bus).preview(which))
    if as_json:
        terminal.print_json(preview.groups)
    elif not preview.groups:
        terminal.say(nothing(which))
    else:
        terminal.print_entries(f'parked in "{domain}": {preview.count:,}', map(group_lines, preview.groups))


def group_lines(group: TroubleshootingGroup) -> tuple[list[object], list[object]]:
    """Return a group as lines for `print_entries`."""
    named = {"group": group.fingerprint, "oldest": group.oldest_parked_at, "newest": group.newest_parked_at}
    return (
        [f"{group.count:,}", group.command_type, group.error_code, *(terminal.named(*pair) for pair in named.items())],
        [group.sample_message or None],
    )


def nothing(which: TroubleshootingFilter) -> str:
    """Return the words for a filter that finds nothing."""
    of_type = f' of type "{which.command_type}"' if which.command_type else ""
    such = " that is chosen" if any((which.error_code, which.fingerprint, which.parked_for, which.text)) else ""
    return f'nothing{of_type}{such} is parked in "{which.domain}"'


def show_parked(
    command_id: Annotated[UUID, typer.Argument(metavar="ID")],
    *,
    domain: Annotated[str | None, typer.Option(help="Default: the one that has this id.")] = None,
    dsn: Dsn = None,
    as_json: AsJson = False,
) -> None:
    """Show a parked command, everything that happened to it, and the group that it belongs to."""

    async def read(bus: CommandBus) -> tuple[Story, Sequence[TroubleshootingGroup]]:
        story = await read_story(bus, command_id, domain)
        command = story.command
        fingerprint = await bus.database.repeat(_desk_calls.fingerprint(command.domain, command_id))
        if fingerprint is None:
            raise CommandStateError(
                f"command {command_id} is {command.status}, not parked: `commandbus show` tells its story"
            )
        which = TroubleshootingFilter(command.domain, command_type=command.command_type, fingerprint=fingerprint)
        return story, (await TroubleshootingQueue(bus).preview(which)).groups

    story, found = ask(dsn, read)
    if as_json:
        terminal.print_json(story._asdict() | {"group": next(iter(found), None)})
    else:
        print_story(story)
        terminal.print_entries("group", map(group_lines, found))
