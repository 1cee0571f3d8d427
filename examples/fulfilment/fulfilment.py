"""Order fulfilment as a process: reserve stock, then charge the card and confirm by mail side by side, then ship.

What was done is undone in reverse when a later step cannot be. Run it against a migrated database:

    COMMAND_BUS_DSN=... python examples/fulfilment/fulfilment.py
"""

from __future__ import annotations

import asyncio
import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from uuid import UUID

import psycopg

from commandbus import (
    BusinessRuleError,
    Command,
    CommandBus,
    Compensate,
    Error,
    Finish,
    HandlerContext,
    HandlerRegistry,
    PermanentCommandError,
    Process,
    Processes,
    ProcessRecord,
    Reply,
    Send,
    TroubleshootingQueue,
    Worker,
)

SCHEMA = """
CREATE TABLE IF NOT EXISTS public.stock (item text PRIMARY KEY, available integer NOT NULL CHECK (available >= 0));
CREATE TABLE IF NOT EXISTS public.done (order_id text NOT NULL, what text NOT NULL, at bigserial);
INSERT INTO public.stock VALUES ('teapot', 5), ('kettle', 0) ON CONFLICT DO NOTHING;
"""


# -- the process -------------------------------------------------------------------------------------------------------


@dataclass
class Order:
    """The state of a fulfilment: what it was told, and what it has learned so far."""

    order_id: str
    item: str
    card: str
    confirmed: bool | None = None
    charged: bool = False


class Fulfilment(Process[Order], domain="orders", deadline=timedelta(days=14)):
    """Ends with the parcel's number, or with nothing reserved and nothing charged."""

    def start(self, state: Order) -> Send:
        """Begin with the stock."""
        order = {"order_id": state.order_id, "item": state.item}
        return Send("stock", "Reserve", order, undo=("stock", "Release", order))

    def on_reserve(self, state: Order, reply: Reply) -> Compensate | list[Send]:
        """Charge and confirm side by side."""
        if reply.failed:
            return Compensate(reply.error)
        charge = {"order_id": state.order_id, "card": state.card}
        return [
            Send("cards", "Charge", charge, undo=("cards", "Refund", charge)),
            Send("mail", "Confirm", {"order_id": state.order_id}, undo=("mail", "Apologize", charge)),
        ]

    def on_charge(self, state: Order, reply: Reply) -> Compensate | Send | None:
        """Without money there is no parcel."""
        if reply.failed:
            return Compensate(reply.error)
        state.charged = True
        return self._ship(state)

    def on_confirm(self, state: Order, reply: Reply) -> Send | None:
        """A mail that cannot be delivered stops no parcel."""
        state.confirmed = reply.succeeded
        return self._ship(state)

    def on_ship(self, state: Order, reply: Reply) -> Compensate | Finish:
        """The end: a parcel, or an error that tells why there is none."""
        if reply.failed:
            return Compensate(reply.error or Error("NOT_SHIPPED"))
        return Finish({"parcel": reply.data["parcel"], "confirmed": state.confirmed})

    def _ship(self, state: Order) -> Send | None:
        """Ship once both have replied."""
        if self.open:
            return None
        return Send("shipping", "Ship", {"order_id": state.order_id}, deadline=timedelta(days=2))


# -- the handlers ------------------------------------------------------------------------------------------------------

registry = HandlerRegistry()
registry.register_process(Fulfilment)


async def note(command: Command, context: HandlerContext) -> None:
    """Keep that this was done, in the transaction that completes the command."""
    assert context.connection is not None  # noqa: S101 - the handlers here are transactional
    await context.connection.execute(
        "INSERT INTO public.done (order_id, what) VALUES (%s, %s)", (command.data["order_id"], command.command_type)
    )


@registry.handler("stock", "Reserve", transactional=True)
async def reserve(command: Command, context: HandlerContext) -> None:
    """Take one off the shelf."""
    assert context.connection is not None  # noqa: S101 - as above
    found = await context.connection.execute(
        "UPDATE public.stock SET available = available - 1 WHERE item = %s AND available > 0", (command.data["item"],)
    )
    if not found.rowcount:
        raise BusinessRuleError("SOLD_OUT", "there is none left")
    await note(command, context)


@registry.handler("stock", "Release", transactional=True)
async def release(command: Command, context: HandlerContext) -> None:
    """Put it back."""
    assert context.connection is not None  # noqa: S101 - as above
    await context.connection.execute(
        "UPDATE public.stock SET available = available + 1 WHERE item = %s", (command.data["item"],)
    )
    await note(command, context)


@registry.handler("cards", "Charge", transactional=True)
async def charge(command: Command, context: HandlerContext) -> None:
    """Take the money. A card whose number cannot be read is for a person to put right."""
    if command.data["card"] == "declined":
        raise BusinessRuleError("DECLINED", "the bank said no")
    if not command.data["card"].isdigit():
        raise PermanentCommandError("UNREADABLE", "the number of the card cannot be read")
    await note(command, context)


@registry.handler("shipping", "Ship", transactional=True)
async def ship(command: Command, context: HandlerContext) -> dict[str, Any]:
    """Hand it to the carrier."""
    await note(command, context)
    return {"parcel": f"P-{command.data['order_id']}"}


for _domain, _type in (("cards", "Refund"), ("mail", "Confirm"), ("mail", "Apologize")):
    registry.handler(_domain, _type, transactional=True)(note)


# -- the program -------------------------------------------------------------------------------------------------------


async def ended(processes: Processes, process_id: UUID) -> ProcessRecord:
    """Wait for the end of a fulfilment, or until it needs a person."""
    while True:
        process = await processes.get_process("orders", process_id)
        if process.status.terminal or process.parked:
            return process
        await asyncio.sleep(0.05)


async def main() -> None:
    """Fulfil three orders: one goes well, one has a card that nobody can read, one is sold out."""
    async with await psycopg.AsyncConnection.connect(os.environ["COMMAND_BUS_DSN"]) as connection:
        await connection.execute(SCHEMA)
    async with CommandBus() as bus:
        processes, queue = Processes(bus), TroubleshootingQueue(bus)
        worker = Worker(bus, registry.domains, registry)
        working = asyncio.create_task(worker.run())
        orders = [Order("1", "teapot", "4242"), Order("2", "teapot", "42?2"), Order("3", "kettle", "4242")]
        for order in orders:
            started = await processes.start_process(Fulfilment, order)
            process = await ended(processes, started.process_id)
            if process.parked:
                print(f"order {order.order_id}: {', '.join(process.open)} needs a person, who corrects the card")
                (parked,) = await queue.list_troubleshooting("cards")
                data = {**parked.data, "card": "4242"}
                await queue.operator_retry("cards", parked.command_id, data=data, operator="ana", reason="typing error")
                while (process := await ended(processes, started.process_id)).parked:
                    pass
            print(f"order {order.order_id}: {process.status} {process.result or process.error}")
            for step in await processes.get_timeline("orders", started.process_id):
                print(f"    {step.number} {step.kind} {step.name}: {step.status}")
        worker.stop()
        await working


if __name__ == "__main__":
    asyncio.run(main())
