"""What a worker's log says of a failure."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import pytest

from commandbus import Command, CommandBus, HandlerContext, PermanentCommandError, TransientCommandError, Worker
from commandbus._calls import Call
from commandbus._database import Database
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


async def test_a_retry_that_is_claimed_before_the_failure_is_answered_has_lost_no_lease(
    bus: CommandBus, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answer that the failure is recorded comes late, and the same worker has the command again by then."""
    again = asyncio.Event()
    run = Database.run

    async def late(database: Database, call: Call[Any], *arguments: Any, **more: Any) -> object:
        answer = await run(database, call, *arguments, **more)
        if "fail_v1" in call.sql:
            await again.wait()
        return answer

    async def fail_once(command: Command, context: HandlerContext) -> None:
        if context.attempt == 1:
            raise TransientCommandError("BUSY")
        again.set()

    monkeypatch.setattr(Database, "run", late)
    async with running(Worker(bus, DOMAIN, registry_of(Debit=fail_once))):
        await settled(bus, await bus.send(DOMAIN, "Debit", {}))
    assert caplog.messages == ["attempt 1 failed with BUSY: again in 0.0 s"]
