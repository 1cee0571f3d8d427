"""A handler that exceeds its timeout has failed; a thread that goes on keeps its slot."""

from __future__ import annotations

import asyncio
import threading
from datetime import timedelta

from commandbus import Command, CommandBus, CommandStatus, HandlerContext, HandlerRegistry, RetryPolicy, Worker
from tests.bus.support import DOMAIN, until
from tests.worker.support import AT_ONCE, PARKED, echo, running, settled

SHORT = timedelta(milliseconds=100)
ONCE = RetryPolicy(max_attempts=1)


async def test_an_async_handler_is_cancelled(bus: CommandBus) -> None:
    seen: list[str] = []
    contexts: list[HandlerContext] = []

    async def slow(command: Command, context: HandlerContext) -> str:
        contexts.append(context)
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            seen.append("cancelled")
            raise
        return "never"

    registry = HandlerRegistry()
    registry.handler(DOMAIN, "Debit", timeout=SHORT, retry=AT_ONCE)(slow)
    async with running(Worker(bus, DOMAIN, registry)):
        command = await settled(bus, await bus.send(DOMAIN, "Debit", {}, max_attempts=2))
    assert (command.status, command.attempts, command.crashes, command.delivery) == (PARKED, 2, 0, 2)
    assert seen == ["cancelled"] * 2
    assert all(context.cancelled for context in contexts)
    assert command.error is not None
    assert command.error.code == "TIMEOUT"
    assert "exceeded its timeout" in command.error.message


async def test_a_timeout_of_the_handlers_own_is_told_apart(bus: CommandBus) -> None:
    async def own(command: Command, context: HandlerContext) -> None:
        async with asyncio.timeout(0.01):
            await asyncio.Event().wait()

    registry = HandlerRegistry()
    registry.handler(DOMAIN, "Debit", timeout=timedelta(hours=1), retry=ONCE)(own)
    async with running(Worker(bus, DOMAIN, registry)):
        command = await settled(bus, await bus.send(DOMAIN, "Debit", {}))
    assert command.error is not None
    assert command.error.code == "TimeoutError"


async def test_a_def_handler_has_failed_at_once_but_keeps_its_thread(bus: CommandBus) -> None:
    go_on = threading.Event()
    running_now: list[HandlerContext] = []

    def slow(command: Command, context: HandlerContext) -> str:
        running_now.append(context)
        go_on.wait(60)
        return "too late"

    def quick(command: Command, context: HandlerContext) -> str:
        return "quick"

    registry = HandlerRegistry()
    registry.handler(DOMAIN, "Slow", timeout=SHORT, retry=ONCE)(slow)
    registry.handler(DOMAIN, "Quick")(quick)
    registry.handler(DOMAIN, "Async")(echo)
    try:
        async with running(Worker(bus, DOMAIN, registry, thread_pool_size=1)):
            late = await bus.send(DOMAIN, "Slow", {})
            command = await settled(bus, late)
            assert (command.status, command.error and command.error.code) == (PARKED, "TIMEOUT")
            assert running_now[0].cancelled
            waits = await bus.send(DOMAIN, "Quick", {})
            # The claimer goes round and round meanwhile: the only thread is not free.
            for n in range(20):
                await settled(bus, await bus.send(DOMAIN, "Async", n))
            assert (await bus.get_command(waits)).delivery == 0
            go_on.set()
            assert (await settled(bus, waits)).result == "quick"
            assert await bus.get_command(late) == command
    finally:
        go_on.set()


async def test_no_more_is_leased_than_threads_are_free(bus: CommandBus) -> None:
    go_on = threading.Event()
    calls: list[str] = []

    def slow(command: Command, context: HandlerContext) -> None:
        calls.append(command.domain)
        go_on.wait(60)

    registry = HandlerRegistry()
    for domain in (DOMAIN, "shipping"):
        registry.handler(domain, "Slow")(slow)
    registry.handler(DOMAIN, "Async")(echo)
    receipts = [await bus.send(domain, "Slow", n) for n in range(5) for domain in (DOMAIN, "shipping")]
    try:
        async with running(Worker(bus, [DOMAIN, "shipping"], registry, thread_pool_size=2)):
            await until(lambda: len(calls) == 2, "two threads at work")
            for n in range(20):
                await settled(bus, await bus.send(DOMAIN, "Async", n))
            assert await bus.count(status=CommandStatus.IN_PROGRESS) == 2
            assert await bus.count(status=CommandStatus.PENDING) == 8
            go_on.set()
            for receipt in receipts:
                assert (await settled(bus, receipt)).delivery == 1
    finally:
        go_on.set()
    assert len(calls) == 10
