"""The subcommand that looks for what cannot be."""

from __future__ import annotations

from commandbus.bus import CommandBus
from commandbus.cli import terminal
from commandbus.cli.database import ask
from commandbus.cli.options import AsJson, Dsn
from commandbus.model import Violation


def verify(*, dsn: Dsn = None, as_json: AsJson = False) -> int:
    """Check that commands and audit tell what the library can have written; ends with 1 if they do not."""

    async def look(bus: CommandBus) -> tuple[int, list[Violation]]:
        return await bus.count(), await bus.verify()

    count, violations = ask(dsn, look)
    if as_json:
        terminal.print_json({"commands": count, "violations": violations})
    else:
        for found in violations:
            terminal.say(f"{found.violation}  {found.domain}  {found.command_id}  {found.detail}")
        plural = "" if len(violations) == 1 else "s"
        terminal.say(f"{count:,} commands checked, {len(violations):,} violation{plural}")
    return int(bool(violations))
