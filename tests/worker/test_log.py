"""What a worker's log says of a failure."""

from __future__ import annotations

import logging

import pytest

from commandbus import Command, CommandBus, HandlerContext, PermanentCommandError, Worker
from tests.bus.support import DOMAIN
from tests.worker.support import registry_of, running, settled


async def test_the_name_of_a_class_forges_no_line(bus: CommandBus, caplog: pytest.LogCaptureFixture) -> None:
    forger = type("Forger\nFORGED LINE\x1b[31m", (Exception,), {})

    async def fail(command: Command, context: HandlerContext) -> None:
        raise forger

    async with running(Worker(bus, DOMAIN, registry_of(Debit=fail))):
        await settled(bus, await bus.send(DOMAIN, "Debit", {}, max_attempts=1))
    told = [message for message in caplog.messages if "failed with" in message]
    assert told == [r"attempt 1 failed with Forger\nFORGED LINE\x1b[31m: it is parked in the troubleshooting queue"]


async def test_a_code_forges_no_line(bus: CommandBus, caplog: pytest.LogCaptureFixture) -> None:
    async def fail(command: Command, context: HandlerContext) -> None:
        raise PermanentCommandError("NO\nFORGED LINE\x1b[31m")

    caplog.set_level(logging.INFO, "commandbus.worker")
    async with running(Worker(bus, DOMAIN, registry_of(Debit=fail))):
        await settled(bus, await bus.send(DOMAIN, "Debit", {}))
    told = [message for message in caplog.messages if "failed with" in message]
    assert told == [r"attempt 1 failed with NO\nFORGED LINE\x1b[31m: it is parked in the troubleshooting queue"]
