"""The subcommand that edits the data of one parked command.

The data stay text, as PostgreSQL writes it: what nobody touched keeps all its digits, also where Python cannot read it.
"""

from __future__ import annotations

import contextlib
import difflib
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated
from uuid import UUID

import typer

from commandbus import _desk_calls, _queries
from commandbus._failures import refusals_of
from commandbus.bus import CommandBus
from commandbus.cli import terminal
from commandbus.cli.database import ask
from commandbus.cli.options import AsJson, Domain, Dsn, Operator, OptionalReason, check_data, read_data
from commandbus.errors import CommandBusError, CommandStateError, ConfigurationError, InvalidCommandError


def edit(
    domain: Domain,
    command_id: Annotated[UUID, typer.Argument(metavar="ID")],
    *,
    data: Annotated[str | None, typer.Option(help="The new data: JSON; `@file` reads a file, `-` stdin.")] = None,
    patch: Annotated[str | None, typer.Option(help="A JSON merge patch of the data; `@file`, `-` as above.")] = None,
    operator: Operator,
    reason: OptionalReason = None,
    dsn: Dsn = None,
    as_json: AsJson = False,
) -> None:
    """Edit the data of a parked command in $VISUAL or $EDITOR, and retry it with the new data."""
    if data is not None and patch is not None:
        raise typer.BadParameter("cannot go with --data", param_hint="--patch")
    given = None if data is None else read_data("--data", data)
    change = None if patch is None else read_data("--patch", patch)
    delivery, before = ask(dsn, lambda bus: _read_parked(bus, domain, command_id))

    def act(verb: str, value: str) -> tuple[str, str]:
        async def work(bus: CommandBus) -> tuple[str, str]:
            database = bus.database
            with refusals_of(f"command {command_id}"):
                if verb == "replace" and await database.repeat(_desk_calls.pretty(value)) == before:
                    raise _kept(command_id)
                call = _desk_calls.operator_bulk(
                    domain, verb, [(command_id, delivery)], operator=operator, reason=reason, value=value
                )
                _check(bus, command_id, (await database.run(call))[command_id])
            await bus.wake(domain)
            return await database.repeat(_desk_calls.edited(domain, command_id, delivery))

        return ask(dsn, work)

    if change is not None:
        old, new = act("retry", change)
    elif given is not None:
        old, new = act("replace", given)
    else:
        with _edited_by_hand(command_id, before) as text:
            old, new = act("replace", text)
    if as_json:
        terminal.print_json(
            {
                "domain": domain,
                "command_id": command_id,
                "old_data": _queries.json_of(old),
                "new_data": _queries.json_of(new),
            }
        )
        return
    # Not splitlines, which would hide characters that end a line elsewhere, such as U+2028.
    for line in difflib.unified_diff(old.split("\n"), new.split("\n"), "old data", "new data", lineterm=""):
        terminal.say(line)
    terminal.say(f"retried {command_id}")


async def _read_parked(bus: CommandBus, domain: str, command_id: UUID) -> _desk_calls.Seen:
    seen = await bus.database.repeat(_desk_calls.parked_data(domain, command_id))
    if seen is None:
        status = (await bus.get_command(domain, command_id)).status
        raise CommandStateError(f"command {command_id} is {status}: cannot edit it. Nothing was done")
    return seen


def _check(bus: CommandBus, command_id: UUID, outcome: str) -> None:
    match outcome:
        case "changed":
            raise CommandStateError(
                f"command {command_id} is no longer parked, or was parked anew while you edited it: nothing was done"
            )
        case "busy":
            raise CommandStateError(
                f"command {command_id} is locked by another transaction: nothing was done; try again when it has ended"
            )
        case "refused":
            raise InvalidCommandError(
                f"command {command_id}: the new data is out of bounds: nothing was done; it may have "
                f"{bus.max_data_bytes} bytes as text and 64 levels"
            )


def _kept(command_id: UUID) -> InvalidCommandError:
    return InvalidCommandError(f"command {command_id} would keep its data: nothing was done; retry it as it is")


@contextlib.contextmanager
def _edited_by_hand(command_id: UUID, text: str) -> Iterator[str]:
    """Let the user's editor loose on the text, and lend what it leaves. Its file is kept when nothing comes of it."""
    editor = os.environ.get("VISUAL") or os.environ.get("EDITOR") or "vi"
    folder = tempfile.mkdtemp(prefix="commandbus-")  # for this user alone
    path = Path(folder, f"{command_id}.json")
    before = f"{text}\n".encode()
    path.write_bytes(before)
    with contextlib.ExitStack() as unless_edited:
        unless_edited.callback(shutil.rmtree, folder)
        try:
            code = subprocess.run([*shlex.split(editor), str(path)], check=False).returncode  # noqa: S603 - the user's choice
            left = path.read_bytes()
        except (OSError, ValueError) as error:
            raise ConfigurationError(f"the editor cannot be used: {error}; set EDITOR") from None
        if code != 0:
            raise CommandBusError(f"command {command_id}: the editor ended with {code}: nothing was done")
        if left == before:
            raise _kept(command_id)
        unless_edited.pop_all()
    try:
        yield _checked(command_id, left)
    except BaseException as error:
        error.add_note(f"what you wrote can be mended and given with --data @{path}")
        raise
    shutil.rmtree(folder)


def _checked(command_id: UUID, left: bytes) -> str:
    try:
        return check_data(left.decode())
    except (ValueError, RecursionError) as error:
        raise InvalidCommandError(
            f"command {command_id}: what the editor left cannot be its data: {error}. Nothing was done"
        ) from None
