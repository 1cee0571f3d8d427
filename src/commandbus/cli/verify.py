"""The subcommand that looks for what cannot be."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Annotated

import typer

from commandbus import _queries
from commandbus.bus import CommandBus
from commandbus.cli import terminal
from commandbus.cli.database import ask
from commandbus.cli.options import AsJson, Dsn, duration
from commandbus.model import Violation


def verify(
    *,
    timeout: Annotated[str, typer.Option(metavar="DURATION", help="How long it may take: 90s, 5m, 1h.")] = "10m",
    dsn: Dsn = None,
    as_json: AsJson = False,
) -> int:
    """Check that commands and audit tell what the library can have written; ends with 1 if they do not."""
    limit = duration("--timeout", timeout)
    count = _queries.count(None, None, None)

    async def look(bus: CommandBus) -> tuple[int, list[Violation]]:
        began = time.monotonic()
        commands = await bus.database.run(count, limit.total_seconds(), long=True)
        left = limit - timedelta(seconds=time.monotonic() - began)
        return commands, await bus.verify(timeout=max(left, timedelta(0)))

    commands, violations = ask(dsn, look)
    if as_json:
        terminal.print_json({"commands": commands, "violations": violations})
    else:
        for found in violations:
            terminal.say(f"{found.violation}  {found.domain}  {found.command_id}  {found.detail}")
        plural = "" if len(violations) == 1 else "s"
        terminal.say(f"{commands:,} commands checked, {len(violations):,} violation{plural}")
    return int(bool(violations))
