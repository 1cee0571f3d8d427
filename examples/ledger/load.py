"""Opens the accounts and sends a command for each line of transfers.csv.

    python load.py [FOLDER]

Reads $COMMAND_BUS_DSN. May be run again after whatever became of it: nothing is sent twice.
"""

from __future__ import annotations

import asyncio
import csv
import os
import sys
from pathlib import Path
from uuid import NAMESPACE_OID, uuid5

import psycopg

from commandbus import CommandBus, SendRequest

HERE = Path(__file__).parent


def open_accounts(dsn: str, rows: list[dict[str, str]]) -> None:
    """Make the ledger's tables and its accounts, as far as they are not there."""
    with psycopg.connect(dsn) as connection, connection.cursor() as cursor:
        cursor.execute((HERE / "schema.sql").read_bytes())
        cursor.executemany(
            "INSERT INTO ledger.account VALUES (%(account_id)s, %(opening_cents)s, %(opening_cents)s) "
            "ON CONFLICT DO NOTHING",
            rows,
        )


async def send(dsn: str, rows: list[dict[str, str]]) -> int:
    """Send a command for each row, as it stands there; returns how many had not been sent before."""
    # The id follows from the row, so the bus knows a transfer that it has got already.
    requests = [
        SendRequest("ledger", "BookTransfer", row, command_id=uuid5(NAMESPACE_OID, row["transfer_id"])) for row in rows
    ]
    async with CommandBus(dsn) as bus:
        return sum(not receipt.duplicate for receipt in await bus.send_batch(requests))


def read(path: Path) -> list[dict[str, str]]:
    """Return the rows of a CSV file."""
    with path.open(encoding="ascii", newline="") as file:
        return list(csv.DictReader(file))


def main(arguments: list[str]) -> None:
    """Load what is in the folder."""
    folder = Path(arguments[0]) if arguments else HERE
    dsn = os.environ["COMMAND_BUS_DSN"]
    accounts, transfers = read(folder / "accounts.csv"), read(folder / "transfers.csv")
    open_accounts(dsn, accounts)
    sent = asyncio.run(send(dsn, transfers))
    print(f"{sent:,} of {len(transfers):,} transfers between {len(accounts)} accounts are sent now")


if __name__ == "__main__":
    main(sys.argv[1:])
