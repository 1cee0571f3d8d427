"""The worker of the nightly report: totals the sales of one shop after the other, then makes the report of the day.

    python report.py

Run as many as you like, and kill them as you like: what a handler writes commits together with the completion of its
command, so each shop is in the report once.
"""

from __future__ import annotations

import logging
from decimal import Decimal, InvalidOperation
from typing import Any
from uuid import UUID

from commandbus import Command, HandlerRegistry, PermanentCommandError
from commandbus.sync import SyncCommandBus, SyncHandlerContext, SyncWorker

registry = HandlerRegistry()


@registry.handler("reports", "TotalShop", transactional=True)
def total_shop(command: Command, context: SyncHandlerContext) -> None:
    """Write down what one shop sold on one day; the part of a batch. Data: `day`, `shop`.

    An amount that nobody can read parks it: trying again would not help, and leaving it out would be a wrong report.
    """
    assert context.connection is not None  # noqa: S101 - a transactional handler has one
    sales = context.connection.execute(
        "SELECT sale_id, amount FROM nightly.sale WHERE day = %(day)s AND shop = %(shop)s", command.data
    )
    total = sum(_amount(sale_id, text) for sale_id, text in sales)
    context.connection.execute(
        "INSERT INTO nightly.total VALUES (%(day)s, %(shop)s, %(total)s)", {**command.data, "total": total}
    )


@registry.handler("reports", "Assemble", transactional=True)
def assemble(command: Command, context: SyncHandlerContext) -> dict[str, Any]:
    """Make the report of a day from the totals of its shops; what a batch sends when it is complete. Data: `day`.

    That a batch has ended says not how: by its counts the report tells of shops that somebody has canceled.
    """
    assert context.connection is not None  # noqa: S101 - as above
    assert command.correlation_id is not None  # noqa: S101 - the id of the batch
    batch = context.bus.get_batch("reports", UUID(command.correlation_id))
    (row,) = context.connection.execute(
        "INSERT INTO nightly.report SELECT %(day)s, coalesce(sum(total), 0) FROM nightly.total WHERE day = %(day)s "
        "RETURNING total::text",
        command.data,
    )
    return {"total": row[0], "shops": batch.completed, "missing": batch.failed + batch.canceled}


def _amount(sale_id: int, text: str) -> Decimal:
    try:
        return Decimal(text)
    except InvalidOperation:
        raise PermanentCommandError("UNREADABLE", f'sale {sale_id}: "{text}" is no amount') from None


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    with SyncCommandBus() as bus:
        SyncWorker(bus, "reports", registry, transactional_connections=8).run()
