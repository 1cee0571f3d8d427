"""The subcommands that look at the troubleshooting queue, and the one that edits a command of it."""

from __future__ import annotations

import difflib
import json
import os
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Annotated, TypeAlias
from uuid import UUID

import typer

from commandbus import _queries
from commandbus.bus import CommandBus
from commandbus.cli import terminal
from commandbus.cli.commands import Story, print_story, read_story
from commandbus.cli.database import ask
from commandbus.cli.options import AsJson, Domain, Dsn, Operator, duration, operator_name, read_json
from commandbus.errors import CommandBusError, CommandStateError, ConfigurationError, InvalidCommandError
from commandbus.model import Command, CommandStatus, Json, TroubleshootingFilter, TroubleshootingGroup
from commandbus.troubleshooting import TroubleshootingQueue

Type: TypeAlias = Annotated[str | None, typer.Option("--type", help="Only this command type.")]
Code: TypeAlias = Annotated[str | None, typer.Option(help="Only this error code.")]
Group: TypeAlias = Annotated[str | None, typer.Option(help="Only this group, as `groups` names it.")]
ParkedFor: TypeAlias = Annotated[
    str | None, typer.Option(metavar="DURATION", help="Only what is parked for so long at least: 90s, 5m, 1h, 2d.")
]
Text: TypeAlias = Annotated[str | None, typer.Option(help="Only with this text in the error's message or in the data.")]
OptionalReason: TypeAlias = Annotated[str | None, typer.Option(help="Why; the audit trail keeps it.")]


def chosen(  # noqa: PLR0917 - the options of a filter, in their order
    domain: str, command_type: str | None, code: str | None, group: str | None, parked_for: str | None, text: str | None
) -> TroubleshootingFilter:
    """Return the filter that the options make."""
    return TroubleshootingFilter(
        domain,
        command_type=command_type,
        error_code=code,
        fingerprint=group,
        parked_for=None if parked_for is None else duration("--parked-for", parked_for),
        text=text,
    )


# -- looking -----------------------------------------------------------------------------------------------------------


def list_parked(
    domain: Domain,
    *,
    command_type: Type = None,
    code: Code = None,
    group: Group = None,
    parked_for: ParkedFor = None,
    text: Text = None,
    limit: Annotated[int, typer.Option(min=1, max=1000)] = 100,
    cursor: Annotated[str | None, typer.Option(help="The `next_cursor` of the page before.")] = None,
    dsn: Dsn = None,
    as_json: AsJson = False,
) -> None:
    """List parked commands with their errors, the longest parked first."""
    which = chosen(domain, command_type, code, group, parked_for, text)
    call = _queries.list_troubleshooting(which, limit=limit, cursor=cursor)
    page = ask(dsn, lambda bus: bus.database.repeat(call))
    if as_json:
        terminal.print_json(page)
    elif not page.items:
        say_nothing(which)
    else:
        terminal.print_entries(f'parked in "{domain}"', map(_command_lines, page))
        if page.next_cursor:
            terminal.say(f"there are more: --cursor {page.next_cursor}")


def _command_lines(command: Command) -> tuple[list[object], list[object]]:
    numbers = (terminal.named("attempts", command.attempts), terminal.named("parked", command.parked_at))
    return [command.command_id, command.command_type, *numbers], [command.error]


def groups(
    domain: Domain,
    *,
    command_type: Type = None,
    code: Code = None,
    group: Group = None,
    parked_for: ParkedFor = None,
    text: Text = None,
    dsn: Dsn = None,
    as_json: AsJson = False,
) -> None:
    """Group parked commands by type, error code and kind of message, the largest group first."""
    which = chosen(domain, command_type, code, group, parked_for, text)
    preview = ask(dsn, lambda bus: TroubleshootingQueue(bus).preview(which))
    if as_json:
        terminal.print_json(preview.groups)
    elif not preview.groups:
        say_nothing(which)
    else:
        terminal.print_entries(f'parked in "{domain}": {preview.count:,}', map(group_lines, preview.groups))


def group_lines(group: TroubleshootingGroup) -> tuple[list[object], list[object]]:
    """Return a group as lines for `print_entries`."""
    named = {"group": group.fingerprint, "oldest": group.oldest_parked_at, "newest": group.newest_parked_at}
    return (
        [f"{group.count:,}", group.command_type, group.error_code, *(terminal.named(*pair) for pair in named.items())],
        [group.sample_message or None],
    )


def say_nothing(which: TroubleshootingFilter) -> None:
    """Say that the filter finds nothing."""
    of_type = f' of type "{which.command_type}"' if which.command_type else ""
    such = " that is chosen" if any((which.error_code, which.fingerprint, which.parked_for, which.text)) else ""
    terminal.say(f'nothing{of_type}{such} is parked in "{which.domain}"')


def show_parked(
    command_id: Annotated[UUID, typer.Argument(metavar="ID")],
    *,
    domain: Annotated[str | None, typer.Option(help="Default: the one that has this id.")] = None,
    dsn: Dsn = None,
    as_json: AsJson = False,
) -> None:
    """Show a parked command, everything that happened to it, and the group that it belongs to."""

    async def read(bus: CommandBus) -> tuple[Story, list[TroubleshootingGroup]]:
        story = await read_story(bus, command_id, domain)
        command = story.command
        fingerprint = await bus.database.repeat(_queries.fingerprint(command.domain, command_id))
        if fingerprint is None:
            raise CommandStateError(
                f"command {command_id} is {command.status}, not parked: `commandbus show` tells its story"
            )
        queue = TroubleshootingQueue(bus)
        return story, await queue.groups(command.domain, command_type=command.command_type, fingerprint=fingerprint)

    story, found = ask(dsn, read)
    if as_json:
        terminal.print_json(story._asdict() | {"group": next(iter(found), None)})
    else:
        print_story(story)
        terminal.print_entries("group", map(group_lines, found))


# -- editing -----------------------------------------------------------------------------------------------------------


def edit(
    domain: Domain,
    command_id: Annotated[UUID, typer.Argument(metavar="ID")],
    *,
    data: Annotated[str | None, typer.Option(help="The new data: JSON; `@file` reads a file, `-` stdin.")] = None,
    patch: Annotated[str | None, typer.Option(help="A JSON merge patch of the data; `@file`, `-` as above.")] = None,
    operator: Operator = None,
    reason: OptionalReason = None,
    dsn: Dsn = None,
    as_json: AsJson = False,
) -> None:
    """Edit the data of a parked command in $VISUAL or $EDITOR, and retry it with the new data."""
    if data is not None and patch is not None:
        raise typer.BadParameter("cannot go with --data", param_hint="--patch")
    given = None if data is None else read_json("--data", data)
    change = None if patch is None else read_json("--patch", patch)
    name = operator_name(operator)
    command = ask(dsn, lambda bus: _read_parked(bus, domain, command_id))
    if patch is not None:
        given = merge_patch(command.data, change)
    elif data is None:
        given = _edit_by_hand(command)
    before, after = _pretty(command.data), _pretty(given)
    if before == after:
        raise InvalidCommandError(f"command {command_id} would keep its data: nothing was done; retry it as it is")
    if given is None:
        raise InvalidCommandError(f"command {command_id}: null cannot be a command's data: nothing was done")

    async def retry(bus: CommandBus) -> None:
        if (await _read_parked(bus, domain, command_id)).delivery != command.delivery:
            raise CommandStateError(f"command {command_id} was parked anew while you edited it: nothing was done")
        await TroubleshootingQueue(bus).operator_retry(domain, command_id, data=given, operator=name, reason=reason)

    ask(dsn, retry)
    if as_json:
        terminal.print_json({"domain": domain, "command_id": command_id, "old_data": command.data, "new_data": given})
        return
    for line in difflib.unified_diff(before.splitlines(), after.splitlines(), "old data", "new data", lineterm=""):
        terminal.say(line)
    terminal.say(f"retried {command_id}")


async def _read_parked(bus: CommandBus, domain: str, command_id: UUID) -> Command:
    command = await bus.get_command(domain, command_id)
    if command.status != CommandStatus.IN_TROUBLESHOOTING_QUEUE:
        raise CommandStateError(f"command {command_id} is {command.status}: cannot edit it. Nothing was done")
    return command


def _pretty(data: Json) -> str:
    return json.dumps(data, indent=2, ensure_ascii=False, sort_keys=True)


def merge_patch(target: Json, patch: Json) -> Json:
    """Return the target with a JSON merge patch (RFC 7396) applied, as the database does it."""
    if not isinstance(patch, dict):
        return patch
    merged = dict(target) if isinstance(target, dict) else {}
    for name, value in patch.items():
        if value is None:
            merged.pop(name, None)
        else:
            merged[name] = merge_patch(merged.get(name), value)
    return merged


def _edit_by_hand(command: Command) -> Json:
    """Let the user's editor loose on the data. Its file is kept when it does not hold JSON afterwards."""
    editor = os.environ.get("VISUAL") or os.environ.get("EDITOR") or "vi"
    folder = tempfile.mkdtemp(prefix="commandbus-")  # for this user alone
    path = Path(folder, f"{command.command_id}.json")
    path.write_text(_pretty(command.data) + "\n", encoding="utf-8")
    kept = False
    try:
        code = subprocess.run([*shlex.split(editor), str(path)], check=False).returncode  # noqa: S603 - the user's choice
        if code != 0:
            raise CommandBusError(f"command {command.command_id}: the editor ended with {code}: nothing was done")
        text = path.read_text(encoding="utf-8")
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as error:
            kept = True
            raise InvalidCommandError(
                f"command {command.command_id}: what the editor left is not JSON: {error}. Nothing was done; it can be "
                f"mended and given with --data @{path}"
            ) from None
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"the editor cannot be used: {error}; set EDITOR") from None
    finally:
        if not kept:
            shutil.rmtree(folder)
