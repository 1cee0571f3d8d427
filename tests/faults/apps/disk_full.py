"""A private PostgreSQL whose disk fills up under a bus and a worker.

`python -m tests.faults.apps.disk_full FOLDER HALF DISK`: HALF is async or sync, DISK is data or wal. Runs where it may
mount a tmpfs. Prints as JSON what has become of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import random
import shutil
import subprocess
import sys
from collections import Counter
from datetime import timedelta
from pathlib import Path
from typing import Any

from psycopg import AsyncConnection

from commandbus import Command, CommandStatus, HandlerContext, HandlerRegistry, Receipt
from commandbus.embedded import EmbeddedPostgres
from commandbus.errors import CommandBusError
from commandbus.migrate import migrate
from tests import blocking
from tests.support import aeventually

DOMAIN = "payments"
MEBIBYTES = {"data": 160, "wal": 48}
SETTINGS = {"fsync": "off", "min_wal_size": "32MB", "max_wal_size": "32MB", "max_connections": "40"}
LARGE = random.Random(0).randbytes(50_000).hex()  # needs new room: it cannot be compressed to nothing


class Disk:
    """A small one, in memory."""

    def __init__(self, folder: Path, mebibytes: int) -> None:
        folder.mkdir(parents=True)
        options = f"size={mebibytes}m,mode=0700"
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", folder], check=True)  # noqa: S607
        self._ballast = folder / "ballast"

    def fill(self) -> None:
        """Leave no room."""
        with contextlib.suppress(OSError), self._ballast.open("ab", buffering=0) as ballast:
            while True:
                ballast.write(b"x" * 4096)

    def free(self) -> None:
        """Give the room back."""
        self._ballast.unlink()


def server_on(folder: Path, disk: str) -> tuple[EmbeddedPostgres, Disk]:
    """A server whose data, or whose write-ahead log, is on a small disk; the other is not."""
    mounted = Disk(folder / disk, MEBIBYTES[disk])
    (folder / "data").mkdir(exist_ok=True)
    server = EmbeddedPostgres(folder / "data", settings=SETTINGS)
    with server:
        (wal,) = server.data_dir.glob("pg*/data/pg_wal")
    there = folder / "wal" / "pg_wal"
    shutil.copytree(wal, there)
    for path in (there.parent, there, *there.rglob("*")):
        os.chown(path, wal.stat().st_uid, wal.stat().st_gid)
    shutil.rmtree(wal)
    wal.symlink_to(there)
    return server.start(), mounted


class Handlers:
    """Handlers that wait for the full disk, and then have something large to record."""

    def __init__(self) -> None:
        self.begun = 0
        self.runs: Counter[str] = Counter()
        self.go_on = asyncio.Event()
        self.registry = HandlerRegistry()
        self.registry.handler(DOMAIN, "Debit")(self.debit)
        self.registry.handler(DOMAIN, "Wait")(self.wait)
        self.registry.handler(DOMAIN, "Fail")(self.fail)
        self.registry.handler(DOMAIN, "Book", transactional=True)(self.book)

    async def debit(self, command: Command, context: HandlerContext) -> None:
        """Return at once."""
        self.runs[str(command.command_id)] += 1

    async def wait(self, command: Command, context: HandlerContext) -> str:
        """Have a large result."""
        self.runs[str(command.command_id)] += 1
        self.begun += 1
        await self.go_on.wait()
        return LARGE

    async def fail(self, command: Command, context: HandlerContext) -> str:
        """Fail for good."""
        await self.wait(command, context)
        raise ValueError("x" * 4000)

    async def book(self, command: Command, context: HandlerContext) -> str:
        """Write in the transaction, and have a large result."""
        assert context.connection is not None
        await context.connection.execute("INSERT INTO public.ledger VALUES (%s)", [command.command_id])
        return await self.wait(command, context)


class Scenario:
    """One bus and one worker, before, while and after the disk is full."""

    def __init__(self, bus: Any, handlers: Handlers) -> None:  # noqa: ANN401 - of either half
        self.bus = bus
        self.handlers = handlers
        self.acknowledged: list[Receipt] = []
        self.errors: set[str] = set()

    async def send(self, command_type: str, data: Any, **more: Any) -> bool:  # noqa: ANN401 - any JSON
        """Send a command; whether it was acknowledged."""
        try:
            self.acknowledged.append(await self.bus.send(DOMAIN, command_type, data, **more))
        except Exception as error:  # noqa: BLE001 - which they are is the question
            self.errors.add(type(error).__name__)
            return False
        return True

    async def send_until_it_fails(self) -> None:
        """What one of several senders does."""
        while await self.send("Debit", LARGE):
            pass

    async def all_settled(self) -> list[Command]:
        """The commands that were acknowledged, once they are finished or parked."""

        async def look(receipt: Receipt) -> Command | None:
            with contextlib.suppress(CommandBusError):
                command: Command = await self.bus.get_command(receipt)
                if command.status.terminal or command.status == CommandStatus.IN_TROUBLESHOOTING_QUEUE:
                    return command
            return None

        found = []
        for receipt in self.acknowledged:
            what = f"the end of {receipt.command_id}"
            found.append(await aeventually(lambda receipt=receipt: look(receipt), timeout=60, what=what))  # type: ignore[misc]
        return [command for command in found if command is not None]


async def trouble(log: Path, words: str) -> None:
    """Come back when the worker or the server has said this."""

    async def said() -> bool:
        return words in log.read_text("utf-8", errors="replace")  # noqa: ASYNC240 - a moment

    await aeventually(said, timeout=60, what=f'"{words}" in {log.name}')


async def main(folder: Path, half: str, disk: str) -> dict[str, Any]:
    """Run the scenario; returns what became of it."""
    ours = folder / "commandbus.log"
    logging.basicConfig(filename=ours, level=logging.WARNING)
    server, mounted = server_on(folder, disk)
    (theirs,) = server.data_dir.glob("pg*/server.log")
    migrate(server.dsn())
    handlers = Handlers()
    kinds = blocking.kinds(half)
    async with await AsyncConnection.connect(server.dsn()) as connection:
        await connection.execute("CREATE TABLE public.ledger (command_id uuid NOT NULL)")
    async with kinds.CommandBus(server.dsn(), send_timeout=timedelta(seconds=3)) as bus:
        worker = kinds.Worker(bus, DOMAIN, handlers.registry, lease=timedelta(minutes=5))
        working = asyncio.create_task(worker.run())
        scenario = Scenario(bus, handlers)
        for command_type in ("Wait", "Wait", "Book", "Book", "Fail"):
            await scenario.send(command_type, None, max_attempts=None if command_type == "Book" else 1)

        async def begun() -> bool:
            return handlers.begun == 5

        await aeventually(begun, what="all handlers")
        mounted.fill()
        await asyncio.gather(*(scenario.send_until_it_fails() for _ in range(4)))
        handlers.go_on.set()
        await trouble(ours, "could not be recorded")
        await trouble(theirs, "No space left on device")
        if disk == "wal":
            await trouble(theirs, "PANIC")
        mounted.free()
        await asyncio.to_thread(server.start)
        while not await scenario.send("Debit", "after"):
            pass
        commands = await scenario.all_settled()
        violations = await bus.verify()
        assert not working.done()
        worker.stop()
        await working
    async with await AsyncConnection.connect(server.dsn()) as connection:
        booked = await (await connection.execute("SELECT count(*), count(DISTINCT command_id) FROM ledger")).fetchone()
    server.stop()
    return {
        "acknowledged": len(scenario.acknowledged),
        "settled": len(commands),
        "errors": sorted(scenario.errors),
        "ends": sorted({(c.command_type, c.status, c.attempts, c.crashes) for c in commands}),
        "most runs": max(handlers.runs[str(c.command_id)] for c in commands if c.command_type != "Book"),
        "booked": booked,
        "violations": len(violations),
    }


if __name__ == "__main__":
    print(json.dumps(asyncio.run(main(Path(sys.argv[1]), sys.argv[2], sys.argv[3]))))  # noqa: T201 - the test reads it
    blocking.shutdown()
