"""A connection of a handler's transaction falls silent: it is given up at the deadline of a call, and costs no more."""

from __future__ import annotations

from typing import Any

import pytest

from commandbus import Command, CommandBus, HandlerContext, HandlerRegistry, Worker, _database
from commandbus.handlers import BlockingContext
from tests.bus.support import DOMAIN, Connection, one, until
from tests.faults.crash_points import CallProxy, Fault, Point
from tests.support import Route, direct_only
from tests.worker.support import AT_ONCE, HOUR, running

WRITE = "INSERT INTO public.ledger VALUES (%s)"


async def debit(command: Command, context: HandlerContext) -> None:
    assert context.connection is not None
    await context.connection.execute(WRITE, [command.command_id])


def debit_in_a_thread(command: Command, context: BlockingContext[Any]) -> None:
    assert context.connection is not None
    context.connection.execute(WRITE, [command.command_id])


@direct_only
@pytest.mark.parametrize("handler", [debit, debit_in_a_thread], ids=["async", "def"])
async def test_a_transaction_that_freezes_at_its_beginning_is_given_up_and_begun_anew(
    route: Route,
    db: Connection,
    monkeypatch: pytest.MonkeyPatch,
    handler: Any,  # noqa: ANN401 - of either colour
) -> None:
    db.execute("CREATE TABLE public.ledger (command_id uuid NOT NULL)")
    registry = HandlerRegistry()
    registry.handler(DOMAIN, "Debit", transactional=True, retry=AT_ONCE)(handler)
    with CallProxy(route["dsn"], Fault.HANG, Point("BEGIN", 1)) as proxy:
        async with CommandBus(**route | {"dsn": proxy.dsn()}) as bus:
            await bus.send(DOMAIN, "Debit", None)
            monkeypatch.setattr(_database, "CALL_SECONDS", 1.0)  # not 10
            async with running(Worker(bus, DOMAIN, registry, lease=HOUR)):  # nobody takes over
                ends = "SELECT status = 'COMPLETED' FROM commandbus.commands"
                await until(lambda: one(db, ends), "the end of the command", 60)
        assert proxy.made_at is not None
    assert one(db, "SELECT count(*) FROM public.ledger") == 1
