"""Has the report of a day made, and shows how far it is. For cron; started again, it goes on with the same batch.

    python nightly.py 2026-01-05 10000

The second argument is the number of shops. Ends with 1 when all that is left needs a person.
"""

from __future__ import annotations

import sys
import uuid
from datetime import timedelta

from commandbus import Batch, SendRequest
from commandbus.sync import SyncCommandBus

NIGHTS = uuid.UUID("a3b5b0a4-0d3c-4b5e-9b61-5b1f3f1f9c55")  # any fixed one of our own


def create(bus: SyncCommandBus, day: str, shops: int) -> Batch:
    """Create the batch of a day, a command for each shop. Its id follows from the day: there is one, however often."""
    return bus.create_batch(
        "reports",
        [SendRequest("reports", "TotalShop", {"day": day, "shop": shop}) for shop in range(shops)],
        name=f"report of {day}",
        on_complete=SendRequest("reports", "Assemble", {"day": day}),
        batch_id=uuid.uuid5(NIGHTS, day),
    )


def watch(bus: SyncCommandBus, batch: Batch) -> Batch:
    """Show the progress of a batch until it is done, or all that is left needs a person."""
    for now in bus.watch_batch(batch.domain, batch.batch_id):
        print(f"{now.progress:.1%} of {now.total} shops, {now.in_trouble} in trouble", flush=True)
        if now.done or (now.in_trouble and not now.open):
            return now
    return batch


def main(day: str, shops: int) -> int:
    """Make the report of a day; returns the exit code."""
    with SyncCommandBus() as bus:
        batch = watch(bus, create(bus, day, shops))
        if not batch.done or batch.on_complete is None:
            print(f"look at them, then: commandbus batch retry reports {batch.batch_id}")
            return 1
        report = bus.wait(batch.on_complete, timeout=timedelta(minutes=5)).data
    print(f"{day}: {report['total']} from {report['shops']} shops, {report['missing']} missing")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2])))
