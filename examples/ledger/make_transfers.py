"""Makes accounts.csv and transfers.csv, the same bytes each time.

    python make_transfers.py [FOLDER]

Most of the transfers are sound: whatever the order they are booked in, each is covered, because an account opens with
more than all that is ever taken from it. So the files alone say what every balance has to be in the end. Some are
impossible on purpose:

- an account is misspelt, with the letter O for a zero;
- an amount is malformed, with a decimal comma: 12,50 instead of 1250;
- an amount is more than its account could ever hold.
"""

from __future__ import annotations

import csv
import random
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

ACCOUNTS = 100
TRANSFERS = 10_000
MISSPELT, MALFORMED, UNCOVERED = 10, 10, 20
MAX_CENTS = 50_000


class Transfer(NamedTuple):
    """A line of transfers.csv, as text: what is impossible in it could not be kept in numbers."""

    transfer_id: str
    source: str
    target: str
    cents: str


def make(count: int = TRANSFERS, seed: int = 2026) -> tuple[dict[str, int], list[Transfer]]:
    """Return the accounts with their opening cents, and the transfers between them."""
    # `random()` is the only method whose sequence Python promises to keep from version to version.
    draw = random.Random(seed).random  # noqa: S311 - no secret
    accounts = [f"ACC-{number:03}" for number in range(ACCOUNTS)]
    with_zero = [account for account in accounts if "0" in account]
    opening: Counter[str] = Counter(dict.fromkeys(accounts, 100_000))
    kinds = ["misspelt"] * MISSPELT + ["malformed"] * MALFORMED + ["uncovered"] * UNCOVERED
    order = sorted(range(count), key=lambda _: draw())
    kind_of = dict(zip(order, kinds, strict=False))
    total = count * MAX_CENTS + sum(opening.values())  # more than there can be in all accounts together
    transfers = []
    for number in range(count):
        kind = kind_of.get(number)
        choice = with_zero if kind == "misspelt" else accounts
        source = choice[int(draw() * len(choice))]
        target = accounts[(accounts.index(source) + 1 + int(draw() * (ACCOUNTS - 1))) % ACCOUNTS]
        cents = 100 + int(draw() * (MAX_CENTS - 100))
        if kind == "uncovered":
            cents += 2 * total
        else:
            opening[source] += cents
        spelling = source.replace("0", "O") if kind == "misspelt" else source
        amount = f"{cents // 100},{cents % 100:02}" if kind == "malformed" else str(cents)
        transfers.append(Transfer(f"T{number + 1:05}", spelling, target, amount))
    return dict(opening), transfers


def write(folder: Path, accounts: dict[str, int], transfers: list[Transfer]) -> None:
    """Write both files to `folder`."""
    with (folder / "accounts.csv").open("w", encoding="ascii", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([("account_id", "opening_cents"), *accounts.items()])
    with (folder / "transfers.csv").open("w", encoding="ascii", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([Transfer._fields, *transfers])


if __name__ == "__main__":
    write(Path(sys.argv[1]) if sys.argv[1:] else Path(__file__).parent, *make())
