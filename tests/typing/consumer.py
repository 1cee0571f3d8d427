"""What a program with type hints writes against both halves; mypy and pyright read this, nobody runs it.

Each `type: ignore` is a mistake that has to be found: one that is not is reported as unused.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, assert_type
from uuid import UUID

import psycopg

from commandbus import (
    AuditEvent,
    Command,
    CommandBus,
    Compensate,
    Finish,
    HandlerContext,
    HandlerRegistry,
    Page,
    Process,
    Processes,
    ProcessReceipt,
    ProcessRecord,
    ProcessStep,
    Receipt,
    Reply,
    Send,
    SendRequest,
    Stat,
    StopReport,
    TroubleshootingQueue,
    Wait,
    Worker,
)
from commandbus.sync import (
    SyncCommandBus,
    SyncHandlerContext,
    SyncRuntime,
    SyncTroubleshootingQueue,
    SyncWorker,
    configure,
    django_connections,
)

registry = HandlerRegistry()


@registry.handler("payments", "Debit")
def debit(command: Command, context: SyncHandlerContext) -> dict[str, int]:
    assert_type(context.bus, SyncCommandBus)
    assert_type(context.connection, psycopg.Connection[Any] | None)
    assert_type(context.bus.send("payments", "Next", command.data), Receipt)
    context.complete_on(context.connection)
    return {"attempt": context.attempt}


@registry.handler("payments", "Credit", transactional=True)
async def credit(command: Command, context: HandlerContext) -> None:
    assert_type(context.bus, CommandBus)
    assert_type(context.connection, psycopg.AsyncConnection[Any] | None)
    assert_type(await context.bus.send("payments", "Next", command.data), Receipt)
    await context.complete_on(context.connection)


@dataclass
class Order:
    order_id: str


class Fulfilment(Process[Order], domain="orders", version=2, deadline=timedelta(days=1)):
    def start(self, state: Order) -> Send:
        return Send("stock", "Reserve", state.order_id, undo=("stock", "Release", None))

    def on_reserve(self, state: Order, reply: Reply) -> Compensate | list[Send | Wait] | None:
        if reply.failed:
            return Compensate(reply.error)
        return None if self.open else [Send("mail", "Confirm"), Wait(timedelta(days=1), "rest")]

    def on_rest(self, state: Order, reply: Reply) -> Finish:
        return Finish({"order": str(self.process_id)})


registry.register_process(Fulfilment)


@contextmanager
def timed(command: Command, context: SyncHandlerContext) -> Generator[None, None, None]:
    assert_type(debit(command, context), dict[str, int])  # registered, it is still a function
    yield


def blocking(command_id: UUID) -> None:
    runtime = SyncRuntime()
    configure(runtime=runtime, thread_pool_size=8)
    with SyncCommandBus("dbname=app", runtime=runtime) as bus:
        assert_type(bus, SyncCommandBus)
        receipt = assert_type(bus.send("payments", "Debit", {"amount": 1}, delay=timedelta(1)), Receipt)
        assert_type(bus.send_batch([SendRequest("payments", "Debit", 1)]), list[Receipt])
        assert_type(bus.get_command(receipt), Command)
        assert_type(bus.get_command("payments", command_id), Command)
        assert_type(bus.query_commands(limit=5), Page[Command])
        assert_type(bus.get_audit_trail(receipt), list[AuditEvent])
        assert_type(bus.count(), int)
        assert_type(bus.stats(), list[Stat])
        queue = SyncTroubleshootingQueue(bus)
        assert_type(queue.list_troubleshooting("payments"), Page[Command])
        assert_type(queue.count_troubleshooting(), int)
        with SyncWorker(bus, "payments", registry, middleware=[django_connections, timed]) as worker:
            assert_type(worker.stop(timedelta(0)), StopReport | None)
        assert_type(SyncWorker(bus, ["payments"], registry).run(), StopReport)
        bus.send("payments", 5, {})  # type: ignore[arg-type]
        bus.send("payments", "Debit", {}, None)  # type: ignore[call-arg]


async def asynchronous(receipt: Receipt) -> None:
    async with CommandBus("dbname=app") as bus:
        assert_type(bus, CommandBus)
        assert_type(await bus.send("payments", "Debit", {}), Receipt)
        assert_type(await TroubleshootingQueue(bus).count_troubleshooting(), int)
        assert_type(await Worker(bus, "payments", registry).run(), StopReport)
        started = await Processes(bus).start_process(Fulfilment, Order("1"))
        assert_type(started, ProcessReceipt)
        assert_type(await Processes(bus).get_process("orders", started.process_id), ProcessRecord)
        assert_type(await Processes(bus).get_timeline("orders", started.process_id), list[ProcessStep])
        await Processes(bus).start_process(Fulfilment, 5)  # type: ignore[misc]
        SyncTroubleshootingQueue(bus)  # type: ignore[arg-type]
        assert_type(SyncCommandBus(bus).count(), int)


async def answer(number: int, text: str) -> float:
    return number / len(text)


def on_a_runtime(runtime: SyncRuntime) -> None:
    assert_type(runtime.run(answer(1, "a")), float)
    assert_type(runtime.run(answer, 1, "a", timeout=5), float)
    runtime.run(answer, "a", 1)  # type: ignore[arg-type,call-arg]
    runtime.run(answer, 1)  # type: ignore[arg-type]
    runtime.run(5)  # type: ignore[call-overload]
