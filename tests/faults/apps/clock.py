"""A worker in a process whose wall clock jumps: `python -m tests.faults.apps.clock DSN HALF LEASE`.

The clock is replaced before anything else is imported, as if the machine's had been set; the monotonic one goes on.
"""

# ruff: noqa: E402 - first the clock

from __future__ import annotations

import datetime as dt
import sys
import time
from typing import Any

_time, _time_ns, _datetime = time.time, time.time_ns, dt.datetime
wrong_by = [0]  # seconds


class _Kind(type):
    def __instancecheck__(cls, value: object) -> bool:
        return isinstance(value, _datetime)


class _ShiftedDatetime(dt.datetime, metaclass=_Kind):
    @classmethod
    def now(cls, tz: dt.tzinfo | None = None) -> Any:  # noqa: ANN401 - a datetime
        return _datetime.now(tz) + dt.timedelta(seconds=wrong_by[0])

    @classmethod
    def utcnow(cls) -> Any:  # noqa: ANN401 - a datetime
        return cls.now(dt.UTC).replace(tzinfo=None)


time.time = lambda: _time() + wrong_by[0]
time.time_ns = lambda: _time_ns() + wrong_by[0] * 1_000_000_000
dt.datetime = _ShiftedDatetime  # type: ignore[misc]

import asyncio
import logging
import signal
import threading
from datetime import datetime, timedelta

from commandbus import (
    Command,
    CommandBus,
    HandlerContext,
    HandlerRegistry,
    RetryPolicy,
    SendRequest,
    TransientCommandError,
)
from commandbus.handlers import BlockingContext
from tests import blocking

DOMAIN = "payments"
registry = HandlerRegistry()
go_on = threading.Event()
AN_HOUR = timedelta(hours=1)


@registry.handler(DOMAIN, "Jump")
async def jump(command: Command, context: HandlerContext) -> list[float]:
    """Set the clock to this; return what it shows, told in two ways."""
    wrong_by[0] = int(command.data - _time())
    return [time.time(), datetime.now(dt.UTC).timestamp()]


@registry.handler(DOMAIN, "Hold", timeout=AN_HOUR)
async def hold(command: Command, context: HandlerContext) -> None:
    """Run until it may end."""
    while not go_on.is_set():  # noqa: ASYNC110 - a thread waits for it as well
        await asyncio.sleep(0.01)


@registry.handler(DOMAIN, "HoldInThread", timeout=AN_HOUR)
def hold_in_a_thread(command: Command, context: BlockingContext[CommandBus]) -> None:
    """The same in a thread."""
    go_on.wait()


@registry.handler(DOMAIN, "GoOn")
async def let_go(command: Command, context: HandlerContext) -> None:
    """Let them end."""
    go_on.set()


@registry.handler(DOMAIN, "Again", retry=RetryPolicy(2, [timedelta(milliseconds=50)]))
async def again(command: Command, context: HandlerContext) -> None:
    """Fail once."""
    if context.attempt == 1:
        raise TransientCommandError("AGAIN")


@registry.handler(DOMAIN, "Send")
async def send(command: Command, context: HandlerContext) -> list[str]:
    """Send to another domain: many with minted ids, one that is due in an hour, and one with the id that is given."""
    sent = await context.bus.send_batch([SendRequest("sent", "Minted", n) for n in range(100)])
    sent += [await context.bus.send("sent", "Minted", n) for n in range(10)]
    await context.bus.send("sent", "Later", None, delay=AN_HOUR)
    await context.bus.send("sent", "Given", None, command_id=command.command_id)
    assert (await context.bus.send("sent", "Given", None, command_id=command.command_id)).duplicate
    return [str(receipt.command_id) for receipt in sent]


async def main(dsn: str, half: str, lease: str) -> None:
    """Work until a signal."""
    kinds = blocking.kinds(half)
    async with kinds.CommandBus(dsn) as bus:
        worker = kinds.Worker(bus, DOMAIN, registry, lease=timedelta(seconds=float(lease)))
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, worker.stop)  # the blocking one is in a thread
        await worker.run()


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    asyncio.run(main(*sys.argv[1:]))
    blocking.shutdown()
