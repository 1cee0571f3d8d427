"""Sends a command for each line of a file, such as orders.csv.

    python import_orders.py orders.csv

The id of a command follows from its line, so importing a file again, or the rest of one that was imported in part,
sends nothing twice.
"""

from __future__ import annotations

import csv
import sys
import uuid
from pathlib import Path

from commandbus import SendRequest
from commandbus.sync import SyncCommandBus

ORDERS = uuid.UUID("6f1ed002-ab5c-4d2e-9d3d-7a8e4f0f8c11")  # any fixed one of our own


def main() -> None:
    """Import the file that the command line names."""
    with Path(sys.argv[1]).open(encoding="utf-8", newline="") as file:
        requests = [
            SendRequest("shop", "ShipOrder", line, command_id=uuid.uuid5(ORDERS, line["order"]))
            for line in csv.DictReader(file)
        ]
    with SyncCommandBus() as bus:
        receipts = bus.send_batch(requests)
    known = sum(receipt.duplicate for receipt in receipts)
    print(f"{len(receipts) - known} orders sent, {known} were known")


if __name__ == "__main__":
    main()
