"""What a handler gets, what becomes of what it returns, and in which context it runs."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider

from commandbus import (
    Command,
    CommandBus,
    CommandStatus,
    HandlerContext,
    HandlerRegistry,
    SendRequest,
    Worker,
    handler,
)
from commandbus.tracing import OpenTelemetryTracing
from tests.bus.support import DOMAIN
from tests.support import Route
from tests.worker.support import Function, all_settled, echo, registry_of, running, settled, story

who: ContextVar[str] = ContextVar("who", default="nobody")


def blocking_echo(command: Command, context: HandlerContext) -> object:
    return command.data


@pytest.mark.parametrize("function", [echo, blocking_echo])
async def test_what_a_handler_returns_is_kept(bus: CommandBus, function: Function) -> None:
    results: list[object] = [None, 0, "", [], {"a": [1, 2.5, None, "ä😀"]}, False]
    async with running(Worker(bus, DOMAIN, registry_of(Debit=function))):
        receipts = [await bus.send(DOMAIN, "Debit", {"result": result}) for result in results]
        commands = await all_settled(bus, receipts)
    assert [command.result["result"] for command in commands] == results
    assert {(c.status, c.attempts, c.crashes, c.delivery) for c in commands} == {(CommandStatus.COMPLETED, 1, 0, 1)}
    assert await story(bus, receipts[0]) == ["SENT", "CLAIMED", "COMPLETED"]


async def test_nothing_returned_is_null(bus: CommandBus) -> None:
    async def nothing(command: Command, context: HandlerContext) -> None:
        return None

    async with running(Worker(bus, DOMAIN, registry_of(Debit=nothing))):
        command = await settled(bus, await bus.send(DOMAIN, "Debit", {}))
    assert (command.status, command.result, command.error) == (CommandStatus.COMPLETED, None, None)


async def test_a_handler_sees_its_command_and_its_context(bus: CommandBus) -> None:
    seen: list[tuple[Command, HandlerContext]] = []

    async def look(command: Command, context: HandlerContext) -> None:
        seen.append((command, context))
        context.raise_if_cancelled()

    worker = Worker(bus, DOMAIN, registry_of(Debit=look))
    async with running(worker):
        receipt = await bus.send(
            DOMAIN, "Debit", {"a": 1}, correlation_id="c", reply_to="r", priority=7, headers={"h": "v"}
        )
        await settled(bus, receipt)
    ((command, context),) = seen
    assert (command.domain, command.command_id, command.command_type) == (DOMAIN, receipt.command_id, "Debit")
    assert (command.data, command.correlation_id, command.reply_to, command.priority) == ({"a": 1}, "c", "r", 7)
    assert (command.status, command.worker) == (CommandStatus.IN_PROGRESS, worker.name)
    assert (context.delivery, context.attempt, context.headers, context.connection) == (1, 1, {"h": "v"}, None)
    assert context.command is command


async def test_methods_of_an_instance_are_handlers(bus: CommandBus) -> None:
    class Ledger:
        def __init__(self) -> None:
            self.sum = 0

        @handler(DOMAIN, "Debit")
        async def debit(self, command: Command, context: HandlerContext) -> int:
            self.sum += command.data
            return self.sum

        @handler(DOMAIN, "Credit")
        def credit(self, command: Command, context: HandlerContext) -> str:
            return threading.current_thread().name

    registry = HandlerRegistry()
    registry.register_instance(ledger := Ledger())
    async with running(worker := Worker(bus, DOMAIN, registry)):
        await settled(bus, await bus.send(DOMAIN, "Debit", 5))
        assert (await settled(bus, await bus.send(DOMAIN, "Debit", 6))).result == 11
        assert worker.name in (await settled(bus, await bus.send(DOMAIN, "Credit", 6))).result
    assert ledger.sum == 11


async def test_a_handler_may_use_the_bus(bus: CommandBus) -> None:
    async def send_on(command: Command, context: HandlerContext) -> str:
        receipt = await bus.send(DOMAIN, "Next", command.data)
        return str((await bus.get_command(receipt)).command_id)

    async with running(Worker(bus, DOMAIN, registry_of(Debit=send_on, Next=echo), concurrency=4)):
        firsts = await all_settled(bus, await bus.send_batch([SendRequest(DOMAIN, "Debit", n) for n in range(50)]))
        ids = {first.result for first in firsts}
        assert len(ids) == 50
        await all_settled(bus, [])
    assert await bus.count(command_type="Next") == 50


# --------------------------------------------------------------------------------------------- context


class Named:
    """Lets the handler run under the value that stands in the headers."""

    def inject(self, headers: dict[str, str]) -> None:
        headers["who"] = who.get()

    def activate(self, headers: Mapping[str, str]) -> AbstractContextManager[object]:
        @contextmanager
        def active() -> Iterator[None]:
            token = who.set(f"for {headers['who']}")
            try:
                yield
            finally:
                who.reset(token)

        return active()


async def test_a_handler_runs_under_the_context_of_its_sender(route: Route) -> None:
    async def on_the_loop(command: Command, context: HandlerContext) -> str:
        await asyncio.sleep(0)
        return who.get()

    def in_a_thread(command: Command, context: HandlerContext) -> str:
        who.set(who.get() + " in a thread")  # stays in this handler's own copy
        return who.get()

    async with CommandBus(**route, tracing=Named()) as bus:

        async def sender(name: str) -> None:
            who.set(name)
            one = await settled(bus, await bus.send(DOMAIN, "Async", {}))
            two = await settled(bus, await bus.send(DOMAIN, "Def", {}))
            assert (one.result, two.result) == (f"for {name}", f"for {name} in a thread")

        registry = registry_of(Async=on_the_loop, Def=in_a_thread)
        async with running(Worker(bus, DOMAIN, registry, thread_pool_size=2)):
            await asyncio.gather(*(sender(f"sender {n}") for n in range(16)))
        assert who.get() == "nobody"


async def test_opentelemetry_goes_from_sender_to_handler(route: Route) -> None:
    tracer = TracerProvider(shutdown_on_exit=False).get_tracer("test")

    def trace_id(command: Command, context: HandlerContext) -> str:
        return f"{trace.get_current_span().get_span_context().trace_id:032x}"

    async def async_trace_id(command: Command, context: HandlerContext) -> str:
        return trace_id(command, context)

    async with CommandBus(**route, tracing=OpenTelemetryTracing()) as bus:
        registry = registry_of(Async=async_trace_id, Def=trace_id)
        async with running(Worker(bus, DOMAIN, registry)):
            for command_type in ("Async", "Def"):
                with tracer.start_as_current_span("send") as span:
                    receipt = await bus.send(DOMAIN, command_type, {})
                expected = f"{span.get_span_context().trace_id:032x}"
                assert (await settled(bus, receipt)).result == expected
            assert (await settled(bus, await bus.send(DOMAIN, "Async", {}))).result == "0" * 32


async def test_a_tracing_hook_that_fails_costs_the_trace_and_not_the_command(route: Route) -> None:
    class Broken(Named):
        def activate(self, headers: Mapping[str, str]) -> AbstractContextManager[object]:
            raise LookupError("no such trace")

    async with CommandBus(**route, tracing=Broken()) as bus, running(Worker(bus, DOMAIN, registry_of(Debit=echo))):
        command = await settled(bus, await bus.send(DOMAIN, "Debit", 1, max_attempts=1))
    assert (command.status, command.result) == (CommandStatus.COMPLETED, 1)
