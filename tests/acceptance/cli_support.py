"""What the tests of the command line share: how it is run, and what its worker imports."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pty
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg

import commandbus
from commandbus import CommandBus
from commandbus.model import Json
from tests.support import eventually

Result = subprocess.CompletedProcess[str]

SHOP = """
import logging, sys, time
from pathlib import Path
from commandbus import HandlerRegistry, PermanentCommandError

registry = HandlerRegistry()
not_a_registry = 42
empty = HandlerRegistry()

@registry.handler("shop", "Buy")
def buy(command, context):
    return {"bought": command.data}

@registry.handler("shop", "Slow")
def slow(command, context):
    Path("started").touch()
    while not Path("go").exists():
        time.sleep(0.01)
    return "slow, but done"

@registry.handler("shop", "Relay")
def relay(command, context):
    return str(context.bus.send("shop", "Buy", command.data).command_id)

@registry.handler("shop", "Refuse")
async def refuse(command, context):
    raise PermanentCommandError("NO_STOCK", "none left", {"asked": command.data})

@registry.handler("shop", "Crash")
def crash(command, context):
    raise ValueError(f"cannot work with {command.data}")

@registry.handler("stock", "Log")
def log(command, context):
    try:
        raise ValueError("first\\n2026-01-01 INFO forged: line")
    except ValueError:
        logging.getLogger("shop").exception("evil \\x1b[31m\\n2026-01-01 INFO forged: line", extra={"domain": "d\\x1b"})
"""

HOSTILE = "\x1b[31mred\x1b[0m [red]markup[/red]\nsecond line\r\u202e\x9b31m :smile: \x7f"


def command_line(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "commandbus", *map(str, arguments)]


def execute(
    *arguments: str | Path,
    dsn: str | None = None,
    stdin: str = "",
    env: Mapping[str, str] | None = None,
    **options: Any,
) -> Result:
    return subprocess.run(
        command_line(*arguments),
        input=stdin, capture_output=True, text=True, timeout=60, env=environment(dsn, env), check=False, **options,
    )  # fmt: skip


def on_terminal(columns: int, *arguments: str | Path, dsn: str) -> list[str]:
    """Run a command line on a terminal of this width; returns the lines that it shows there."""
    reading, writing = pty.openpty()
    with open(reading, "rb", closefd=True) as screen:  # noqa: PTH123 - it is no path
        process = subprocess.Popen(
            command_line(*arguments),
            stdin=writing, stdout=writing, stderr=writing, env=environment(dsn, {"COLUMNS": str(columns)}),
        )  # fmt: skip
        os.close(writing)
        shown = b""
        with contextlib.suppress(OSError):  # the terminal is gone
            while part := os.read(screen.fileno(), 4096):
                shown += part
        assert process.wait(60) == 0, shown
    return shown.decode().splitlines()


def at_once(*calls: Callable[[], Result]) -> list[Result]:
    """Run command lines that do not touch each other side by side; returns their results in order."""
    with ThreadPoolExecutor(len(calls)) as threads:
        return [future.result() for future in [threads.submit(call) for call in calls]]


def environment(dsn: str | None, env: Mapping[str, str] | None = None) -> dict[str, str]:
    given = {} if dsn is None else {"COMMAND_BUS_DSN": dsn}
    library = str(Path(commandbus.__file__).parents[1])  # also where a relative PYTHONPATH does not lead there
    return {**os.environ, "COLUMNS": "250", "PYTHONPATH": library, **given, **(env or {})}


@contextmanager
def running(*arguments: str | Path, dsn: str | None = None, folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Start the command line in `folder`; what it writes goes to the files `out` and `err` there."""
    with (folder / "out").open("w") as out, (folder / "err").open("w") as err:
        process = subprocess.Popen(
            command_line(*arguments),
            stdin=subprocess.DEVNULL, stdout=out, stderr=err, text=True, cwd=folder, env=environment(dsn),
        )  # fmt: skip
    try:
        yield process
    finally:
        process.kill()
        process.wait()


class CommandLine:
    """The command line with the DSN of the test's database in its environment."""

    def __init__(self, dsn: str) -> None:
        self.dsn = dsn

    def __call__(
        self, *arguments: str | Path, code: int = 0, quiet: bool = False, remarks: bool = False, **options: Any
    ) -> Result:
        """Run it. `remarks`: it may take long enough to tell on stderr how far it is."""
        result = execute(*arguments, dsn=self.dsn, **options)
        assert result.returncode == code, result
        assert "Traceback" not in result.stderr
        if code and not quiet:
            assert re.fullmatch(r"(commandbus: .+\n)+", result.stderr), result.stderr
        else:
            assert remarks or result.stderr == ""
        return result

    def json(self, *arguments: str | Path, **options: Any) -> Json:
        result = self(*arguments, "--json", **options)
        assert result.stdout.isascii()
        assert result.stdout.count("\n") == 1, "one document, one line"
        return json.loads(result.stdout)

    # What a test prepares and looks at beside its subject needs no process: one takes a third of a second.

    def send(self, domain: str, command_type: str, data: str = "{}", **options: Any) -> str:
        """Send as an application does, without a process; returns the id."""

        async def send() -> str:
            async with CommandBus(self.dsn) as bus:
                return str((await bus.send(domain, command_type, json.loads(data), **options)).command_id)

        return asyncio.run(send())

    def look(self, column: str, command_id: str) -> object:
        """Look into the database, without a process."""
        with psycopg.connect(self.dsn) as connection:
            query = f"select {column} from commandbus.commands where command_id = %s"
            (row,) = connection.execute(query.encode(), [command_id]).fetchall()
            return row[0]

    def status(self, command_id: str) -> str:
        return str(self.look("status", command_id))


Park = Callable[..., str]


def log_of(folder: Path) -> str:
    return (folder / "err").read_text()


@contextmanager
def worker(cli: CommandLine, folder: Path, *options: str) -> Iterator[subprocess.Popen[str]]:
    with running("worker", "shop_handlers:registry", *options, dsn=cli.dsn, folder=folder) as process:
        eventually(lambda: "starts" in log_of(folder), timeout=30, what="the worker's start")
        yield process
