"""The subcommands that set up or run something: migrate, demo, dev, worker."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import shlex
import sys
import threading
import traceback
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import psycopg
import typer

from commandbus import migrate as migrations
from commandbus.bus import CommandBus
from commandbus.cli import terminal
from commandbus.cli.database import on_bus, until_stopped
from commandbus.cli.options import AsJson, DataDir, Dsn, duration
from commandbus.demo import run as run_demo
from commandbus.embedded import EmbeddedPostgres
from commandbus.errors import CommandBusError, ConfigurationError
from commandbus.handlers import HandlerRegistry
from commandbus.sync import SyncCommandBus, SyncRuntime
from commandbus.sync.worker import LoopWorker


class LogFormat(StrEnum):
    """How a worker's log looks."""

    TEXT = "text"
    JSON = "json"


_LINES = {LogFormat.TEXT: terminal.TextLines, LogFormat.JSON: terminal.JsonLines}


class LogLevel(StrEnum):
    """From which level on a worker logs."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


def migrate(
    *,
    check: Annotated[bool, typer.Option("--check", help="Change nothing; 1 if there is something to apply.")] = False,
    print_: Annotated[bool, typer.Option("--print", help="Print the SQL for an empty database; needs none.")] = False,
    after: Annotated[
        int, typer.Option(metavar="N", min=0, help="With --print: for a database that is at migration N.")
    ] = 0,
    roles: Annotated[
        bool, typer.Option("--roles", help="From now on, let only the roles of commandbus use it; make them.")
    ] = False,
    dsn: Dsn = None,
    as_json: AsJson = False,
) -> int:
    """Bring the database's schema to this version."""
    if check and (print_ or roles):
        raise typer.BadParameter("--check changes nothing: it goes neither with --print nor with --roles")
    if after and not print_:
        raise typer.BadParameter("--after goes with --print: the database itself says where it is")
    if print_:
        text = migrations.script(after, roles=roles)
        terminal.print_json({"sql": text}) if as_json else typer.echo(text)
        return 0
    try:
        names = migrations.pending(dsn) if check else migrations.migrate(dsn, roles=roles)
    except psycopg.errors.InsufficientPrivilege as error:
        who = "the owner of the database" + (", with CREATEROLE" if roles else "")
        raise CommandBusError(f"{error.diag.message_primary}; run it as {who}") from None
    if as_json:
        terminal.print_json({"pending" if check else "applied": names})
    elif names:
        terminal.say(f"{'to apply' if check else 'applied'}: {', '.join(names)}")
    else:
        terminal.say("the schema is up to date")
    if roles and not as_json:
        terminal.say("from now on only members of its roles may use it")
    return int(check and bool(names))


def demo(
    *,
    data_dir: Annotated[Path | None, typer.Option(help="The server's folder. Default: a temporary one.")] = None,
    as_json: AsJson = False,
) -> int:
    """Show the bus at work on a private PostgreSQL; $COMMAND_BUS_DSN is not looked at."""
    return run_demo(json_output=as_json, data_dir=data_dir)


def dev(*, data_dir: DataDir = None, as_json: AsJson = False) -> None:
    """Run a private PostgreSQL with a migrated database `commandbus` until Ctrl-C or SIGTERM; prints its DSN."""
    with until_stopped(), EmbeddedPostgres(data_dir) as server:
        with (
            psycopg.connect(server.dsn(), autocommit=True) as connection,
            contextlib.suppress(psycopg.errors.DuplicateDatabase, psycopg.errors.UniqueViolation),
        ):
            connection.execute("CREATE DATABASE commandbus")
        dsn = server.dsn("commandbus")
        migrations.migrate(dsn)
        if as_json:
            terminal.print_json({"dsn": dsn, "data_dir": str(server.data_dir), "major": server.major})
        else:
            terminal.say(f"PostgreSQL {server.major} runs in {server.data_dir} until you press Ctrl-C. To use it:")
            terminal.say(f"export COMMAND_BUS_DSN={shlex.quote(dsn)}")
        threading.Event().wait()


# -- the worker --------------------------------------------------------------------------------------------------------


def worker(
    registry: Annotated[
        str,
        typer.Argument(metavar="MODULE:REGISTRY", help="Where the HandlerRegistry is; found from this folder too."),
    ],
    *,
    domain: Annotated[list[str] | None, typer.Option(help="May be repeated. Default: all of the registry.")] = None,
    concurrency: Annotated[int, typer.Option(min=1, help="How many handlers run at once.")] = 100,
    threads: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="How many of them may be `def` functions. Default: $COMMAND_BUS_SYNC_THREADS, else min(32, CPUs).",
        ),
    ] = None,
    lease: Annotated[
        str, typer.Option(metavar="DURATION", help="How long a command stays ours unless renewed.")
    ] = "60s",
    grace: Annotated[str, typer.Option(metavar="DURATION", help="How long a stop waits for handlers.")] = "30s",
    log_level: LogLevel = LogLevel.INFO,
    log_format: LogFormat = LogFormat.TEXT,
    dsn: Dsn = None,
) -> None:
    """Run handlers until SIGTERM or Ctrl-C; let those that run finish, and end with exit code 0.

    A second signal does not wait for them: their commands are released, uncharged.
    """
    terminal.log_to_stderr(log_level.upper(), _LINES[log_format]())
    lease_time, grace_time = duration("--lease", lease), duration("--grace", grace)
    with until_stopped():
        handlers = _load(registry)

        async def work(bus: CommandBus) -> None:
            worker = LoopWorker(
                bus,
                domain or handlers.domains,
                handlers,
                concurrency=concurrency,
                thread_pool_size=threads,
                lease=lease_time,
                grace=grace_time,
            )
            worker.on(SyncCommandBus(bus, runtime=SyncRuntime.of(asyncio.get_running_loop())))
            await worker.run()

        asyncio.run(on_bus(dsn, work, "commandbus worker"))


def _load(place: str) -> HandlerRegistry:
    """Import the registry that `MODULE:REGISTRY` names, as `python -m` would: this folder comes first."""
    module, _, name = place.partition(":")
    if not module or not name:
        raise typer.BadParameter(f"{place} is not MODULE:REGISTRY, such as shop.handlers:registry")
    if module.endswith(".py"):
        parts = Path(module).with_suffix("").parts
        likely = ".".join(part for part in parts if part.isidentifier())
        raise typer.BadParameter(f"{place} names a file, and not a module: try {likely}:{name}")
    sys.path.insert(0, str(Path.cwd()))
    try:
        found = getattr(importlib.import_module(module), name)
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(f"{error.name}."):
            why = f"no module {error.name} in {Path.cwd()}, nor among what is installed"
        else:
            frames = traceback.extract_tb(error.__traceback__)
            theirs = [f for f in frames if f.filename not in {__file__, importlib.__file__} and f.filename[0] != "<"]
            where = f" ({theirs[-1].filename}:{theirs[-1].lineno})" if theirs else ""
            why = f"{type(error).__name__}: {error}{where}"
        raise ConfigurationError(f"cannot load {place}: {why}") from error
    if not isinstance(found, HandlerRegistry):
        raise ConfigurationError(f"{place} is a {type(found).__name__}: it must be a HandlerRegistry")
    if not found.domains:
        raise ConfigurationError(f"{place} has no handlers")
    return found
