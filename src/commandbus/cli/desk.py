"""The subcommands that look at many commands: list, stats, workers."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from datetime import datetime
from typing import Annotated, TypeAlias
from uuid import UUID

import typer

from commandbus import _queries
from commandbus.bus import CommandBus
from commandbus.cli import terminal
from commandbus.cli.database import ask, on_bus, until_stopped
from commandbus.cli.options import AsJson, Cursor, Dsn, Limit, duration
from commandbus.model import Command, CommandStatus, Json, Page, Stat

OfDomain: TypeAlias = Annotated[str | None, typer.Option("--domain", help="Only this domain.")]
Look: TypeAlias = Callable[[CommandBus], Awaitable[None]]

_FOLLOW_SECONDS = 1.0
_WATCH_SECONDS = 2.0


def list_commands(
    *,
    domain: OfDomain = None,
    status: Annotated[CommandStatus | None, typer.Option(case_sensitive=False, help="Only this status.")] = None,
    command_type: Annotated[str | None, typer.Option("--type", help="Only this command type.")] = None,
    since: Annotated[
        str | None, typer.Option(metavar="DURATION", help="Only those sent at most so long ago: 90s, 5m, 1h, 2d.")
    ] = None,
    limit: Limit = 100,
    cursor: Cursor = None,
    follow: Annotated[
        bool,
        typer.Option(
            "--follow",
            help="Look again every second, and print what is new or has changed among the newest --limit of a domain, "
            "until Ctrl-C; with --json a line for each.",
        ),
    ] = False,
    dsn: Dsn = None,
    as_json: AsJson = False,
) -> None:
    """List commands, finished ones too, newest first within a domain."""
    if follow and cursor is not None:
        raise typer.BadParameter("choose one of --follow and --cursor")
    age = None if since is None else duration("--since", since)

    def page(bus: CommandBus, domain: str | None) -> Awaitable[Page[Command]]:
        return bus.query_commands(
            domain=domain, status=status, command_type=command_type, since=age, limit=limit, cursor=cursor
        )

    if follow:
        _until_stopped(dsn, _follow(page, domain, as_json=as_json), _FOLLOW_SECONDS)
    else:
        found = ask(dsn, lambda bus: page(bus, domain))
        terminal.print_page(found, _lines, "no such commands", as_json=as_json)


def _follow(
    page: Callable[[CommandBus, str | None], Awaitable[Page[Command]]], domain: str | None, *, as_json: bool
) -> Look:
    shown: dict[tuple[str, UUID], tuple[object, ...]] = {}

    async def look(bus: CommandBus) -> None:
        domains = [domain] if domain else await bus.database.repeat(_queries.domains())
        found = [command for each in domains for command in await page(bus, each)]
        before = shown.copy()
        shown.clear()
        for command in sorted(found, key=lambda command: command.sent_at):
            key = command.domain, command.command_id
            shown[key] = command.status, command.delivery, command.attempts, command.crashes
            if shown[key] != before.get(key):
                terminal.print_json(command) if as_json else terminal.print_entry(*_lines(command))

    return look


def _lines(command: Command) -> tuple[list[object], list[object]]:
    numbers = (terminal.named("attempts", command.attempts or None), terminal.named("due", command.due_at))
    head: list[object] = [
        command.sent_at,
        command.domain,
        command.command_id,
        command.command_type,
        command.status,
        *numbers,
    ]
    return head, [command.error]


# -- counts ------------------------------------------------------------------------------------------------------------


def stats(
    *,
    domain: OfDomain = None,
    watch: Annotated[bool, typer.Option("--watch", help="Look again every two seconds, until Ctrl-C.")] = False,
    dsn: Dsn = None,
    as_json: AsJson = False,
) -> None:
    """Count the unfinished commands by domain, type and status, with the age of the oldest, and the living workers."""

    async def look(bus: CommandBus) -> None:
        counts, now = await bus.stats(domain=domain), await bus.database.repeat(_queries.clock())
        known = await bus.database.repeat(_queries.workers(domain))
        alive = Counter(worker["domain"] for worker in known if worker["alive"])
        if watch:
            terminal.start_screen()
        if as_json:
            terminal.print_json({"at": now, "unfinished": counts, "workers": alive})
        else:
            _print_stats(counts, now, alive)

    _until_stopped(dsn, look, _WATCH_SECONDS) if watch else ask(dsn, look)


def _print_stats(counts: list[Stat], now: datetime, alive: Counter[Json]) -> None:
    terminal.print_entries(
        "unfinished commands" if counts else "no unfinished commands",
        (
            ([of.domain, of.command_type, of.status, of.count, terminal.named("oldest", now - of.oldest_sent_at)], [])
            for of in counts
        ),
    )
    domains = sorted({*alive, *(stat.domain for stat in counts)})
    if domains:
        terminal.print_entries("living workers", (([domain, alive[domain]], []) for domain in domains))


def workers(*, domain: OfDomain = None, dsn: Dsn = None, as_json: AsJson = False) -> None:
    """List the workers that have announced themselves, and since when those that are gone were not seen."""
    found = ask(dsn, lambda bus: bus.database.repeat(_queries.workers(domain)))
    if as_json:
        terminal.print_json(found)
    elif not found:
        terminal.say("no worker has announced itself")
    for worker in () if as_json else found:
        state = "alive" if worker["alive"] else "gone"
        names = ("concurrency", "started_at", "seen_at")
        numbers = (terminal.named(name, worker[name]) for name in names)
        terminal.print_entry(
            [worker["domain"], worker["worker"], state, *numbers], [", ".join(worker["command_types"])]
        )


def _until_stopped(dsn: str | None, look: Look, seconds: float) -> None:
    """Look again and again; Ctrl-C is the way to end it, and no failure."""

    async def work(bus: CommandBus) -> None:
        while True:
            await look(bus)
            await asyncio.sleep(seconds)

    with until_stopped():
        asyncio.run(on_bus(dsn, work, "commandbus cli"))
