"""Sends and is interrupted, so many times, each time at a random moment inside the library; tells what it knows.

Arguments: the DSN, what is called (send, send_batch, call or run), what interrupts it (KeyboardInterrupt, Late or
timeout), how many times, and the seed. Prints what was acknowledged, and for each interruption the ids and what was
said of them.
"""

from __future__ import annotations

import asyncio
import json
import random
import signal
import sys
from collections.abc import Callable
from datetime import timedelta
from types import FrameType
from uuid import UUID, uuid4

from commandbus import CommandBusError, SendRequest
from commandbus.sync import SyncCommandBus

DSN, CALL, BY, TIMES, SEED = sys.argv[1:]
moments = random.Random(SEED)
runs: list[UUID] = []
"""What `effect` has done, which is to `run` what the table is to a send."""


class Late(Exception):  # noqa: N818 - not an error
    """What a program's own handler of SIGALRM raises."""


KINDS: dict[str, type[BaseException]] = {"KeyboardInterrupt": KeyboardInterrupt, "Late": Late}


async def effect(command_id: UUID) -> None:
    """Do something after a while, and nothing if cancelled before."""
    await asyncio.sleep(moments.uniform(0, 0.002))
    runs.append(command_id)


class Alarm:
    """Raises an exception in the main thread, if that is inside the library; otherwise soon."""

    def __init__(self) -> None:
        self.rung: BaseException | None = None
        signal.signal(signal.SIGALRM, self._ring)

    def set(self) -> None:
        self.rung = None
        signal.setitimer(signal.ITIMER_REAL, moments.uniform(0.00001, 0.004))

    def _ring(self, _: int, frame: FrameType | None) -> None:
        while frame is not None and not frame.f_globals["__name__"].startswith("commandbus."):
            frame = frame.f_back
        if frame is None:
            signal.setitimer(signal.ITIMER_REAL, 0.0001)
        else:
            self.rung = KINDS[BY]()
            raise self.rung


class Calls:
    """The calls that are tried; each takes the ids of its commands."""

    def __init__(self, bus: SyncCommandBus) -> None:
        self.bus = bus

    def send(self, ids: list[UUID]) -> None:
        self.bus.opened()._send_timeout = timeout() or 30
        self.bus.send("payments", "Debit", 1, command_id=ids[0])

    def send_batch(self, ids: list[UUID]) -> None:
        self.bus.opened()._send_timeout = timeout() or 30
        self.bus.send_batch([SendRequest("payments", "Debit", 1, command_id=one) for one in ids])

    def call(self, ids: list[UUID]) -> None:
        self.bus.opened()._send_timeout = timeout() or 30
        seconds = timeout()
        patience = None if seconds is None else timedelta(seconds=seconds)
        self.bus.call("payments", "Debit", 1, command_id=ids[0], timeout=patience)

    def run(self, ids: list[UUID]) -> None:
        self.bus.runtime.run(effect, ids[0], timeout=timeout())


def timeout() -> float | None:
    return moments.uniform(0.00001, 0.003) if BY == "timeout" else None


def main() -> None:
    bus = SyncCommandBus(DSN)
    bus.open()
    alarm = Alarm()
    call: Callable[[list[UUID]], None] = getattr(Calls(bus), CALL)
    acknowledged: list[UUID] = []
    interrupted: list[tuple[list[UUID], list[str]]] = []
    while len(interrupted) < int(TIMES):
        if BY != "timeout":
            alarm.set()
        while True:
            ids = [uuid4() for _ in range(3 if CALL == "send_batch" else 1)]
            try:
                call(ids)
            except (KeyboardInterrupt, Late) as error:
                assert error is alarm.rung  # noqa: PT017 - no test
                interrupted.append((ids, getattr(error, "__notes__", [])))
                break
            except (TimeoutError, CommandBusError) as error:
                assert BY == "timeout", error  # noqa: PT017 - no test
                interrupted.append((ids, [str(error)]))
                break
            acknowledged += ids
    done = list(runs)
    bus.close()
    print(json.dumps({"acknowledged": acknowledged, "interrupted": interrupted, "runs": done}, default=str))  # noqa: T201


main()
