"""A sender: `python sender.py DSN KIND RATE SHARED`, with KIND async or sync. Prints what it did at its end, as JSON.

Written for 0.1.0 and for what came later. It sends to everybody's types in turn, `RATE` commands a second, until
SIGTERM. Every other id is made from the number and `SHARED`, so that whoever sends with the same sends the same
command. It prints a line for each hundred, and at the end its receipts, and when it waited for how long.
"""

from __future__ import annotations

import asyncio
import json
import logging
import signal
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from typing import Any
from uuid import UUID, uuid4, uuid5

from commandbus import CommandBus

DOMAIN = "payments"
TYPES = ["Echo", "Echo", "Book", "Retry", "Echo", "Book", "Refuse", "Echo", "Book", "Park"]
LANES = 8


class Record:
    """What the lanes have done together."""

    def __init__(self, shared: str) -> None:
        self._shared = UUID(shared)
        self._numbers = count()
        self._lock = threading.Lock()
        self.sent: list[tuple[str, str, int, bool]] = []
        self.waits: list[tuple[float, float]] = []

    def next(self) -> tuple[int, str, dict[str, Any]]:
        """The number, the type and the other arguments of the next send."""
        number = next(self._numbers)
        command_id = uuid5(self._shared, str(number)) if number % 2 else uuid4()
        return number, TYPES[number // 2 % len(TYPES)], {"command_id": command_id}

    def note(self, number: int, command_type: str, receipt: Any, began: float) -> None:  # noqa: ANN401 - either's
        """Note a receipt, and how long it took."""
        with self._lock:
            self.sent.append((str(receipt.command_id), command_type, number, receipt.duplicate))
            self.waits.append((began, time.time() - began))
            if len(self.sent) % 100 == 0:
                sys.stdout.write(f"{len(self.sent)}\n")
                sys.stdout.flush()


def moments(lane: int, rate: float) -> Iterator[float]:
    """How long to wait before each send of a lane, for so many of all lanes in a second."""
    begin = time.monotonic()
    for turn in count():
        yield max(0.0, begin + (turn * LANES + lane) / rate - time.monotonic())


async def send(dsn: str, record: Record, rate: float) -> None:
    """Send on the loop; every tenth is looked up, for there are readers too."""
    over = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, over.set)

    async def run(bus: CommandBus, lane: int) -> None:
        for wait in moments(lane, rate):
            await asyncio.sleep(wait)
            if over.is_set():
                return
            number, command_type, more = record.next()
            began = time.time()
            receipt = await bus.send(DOMAIN, command_type, {"n": number}, **more)
            if number % 10 == 0:
                await bus.get_command(receipt)
            record.note(number, command_type, receipt, began)

    async with CommandBus(dsn) as bus, asyncio.TaskGroup() as group:
        for lane in range(LANES):
            group.create_task(run(bus, lane))


def send_blocking(dsn: str, record: Record, rate: float) -> None:
    """Send in threads, with the same looks."""
    from commandbus.sync import SyncCommandBus  # 0.1.0 does not have it

    over = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: over.set())

    def run(bus: SyncCommandBus, lane: int) -> None:
        for wait in moments(lane, rate):
            if over.wait(wait):
                return
            number, command_type, more = record.next()
            began = time.time()
            receipt = bus.send(DOMAIN, command_type, {"n": number}, **more)
            if number % 10 == 0:
                bus.get_command(receipt)
            record.note(number, command_type, receipt, began)

    with SyncCommandBus(dsn) as bus, ThreadPoolExecutor(LANES) as pool:
        for done in [pool.submit(run, bus, lane) for lane in range(LANES)]:
            done.result()


def main(dsn: str, kind: str, rate: str, shared: str) -> None:
    """Send as the one or the other, and tell."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s %(message)s")
    record = Record(shared)
    if kind == "async":
        asyncio.run(send(dsn, record, float(rate)))
    else:
        send_blocking(dsn, record, float(rate))
    sys.stdout.write(json.dumps({"sent": record.sent, "waits": record.waits}) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
