"""Proves that the ledger balances to the cent and that no transfer was booked twice.

    python proof.py DSN [FOLDER]

It compares accounts.csv and transfers.csv of the folder with the ledger's tables, and knows nothing of commandbus.
Prints what it found, and ends with 1 if that is not what has to be there.
"""

from __future__ import annotations

import csv
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import psycopg
from psycopg.rows import class_row


class Transfer(NamedTuple):
    """A transfer as it was meant."""

    transfer_id: str
    source: str
    target: str
    cents: int


class Entry(NamedTuple):
    """A row of ledger.entry."""

    transfer_id: str
    account_id: str
    cents: int


class Account(NamedTuple):
    """A row of ledger.account."""

    account_id: str
    opening_cents: int
    balance_cents: int


def meant(row: dict[str, str]) -> Transfer:
    """Return what a line of transfers.csv was meant to say: a letter O is a zero, 12,50 is 1250 cents."""
    source, target = row["source"].replace("O", "0"), row["target"].replace("O", "0")
    return Transfer(row["transfer_id"], source, target, int(row["cents"].replace(",", "")))


def read(folder: Path) -> tuple[dict[str, int], list[Transfer]]:
    """Return the opening cents of each account, and the transfers, from the two files."""
    with (folder / "accounts.csv").open(encoding="ascii", newline="") as file:
        opening = {row["account_id"]: int(row["opening_cents"]) for row in csv.DictReader(file)}
    with (folder / "transfers.csv").open(encoding="ascii", newline="") as file:
        return opening, [meant(row) for row in csv.DictReader(file)]


def covered(opening: dict[str, int], transfers: list[Transfer]) -> list[Transfer]:
    """Return the transfers that are covered, whatever the order they are booked in.

    All others exceed the money of all accounts together. Were there any in between, the file would prove nothing.
    """
    possible = [transfer for transfer in transfers if transfer.cents <= sum(opening.values())]
    taken: Counter[str] = Counter()
    for transfer in possible:
        taken[transfer.source] += transfer.cents
    if short := [account for account, cents in taken.items() if cents > opening[account]]:
        raise ValueError(f"whether these accounts cover their transfers depends on the order: {short}")
    return possible


def wrong_bookings(transfers: list[Transfer], to_book: list[Transfer], entries: list[Entry]) -> Iterator[str]:
    """Tell each transfer that was not booked exactly as it had to be."""
    booked: defaultdict[str, list[tuple[str, int]]] = defaultdict(list)
    for entry in entries:
        booked[entry.transfer_id].append((entry.account_id, entry.cents))
    once = {to.transfer_id: sorted([(to.source, -to.cents), (to.target, to.cents)]) for to in to_book}
    for transfer in transfers:
        due = once.get(transfer.transfer_id, [])
        there = sorted(booked.pop(transfer.transfer_id, []))
        if due and there == sorted(due * 2):
            yield f"{transfer.transfer_id} is booked twice"
        elif there != due:
            yield f"{transfer.transfer_id} is booked as {there or 'nothing'}, not as {due or 'nothing'}"
    for transfer_id in booked:
        yield f"{transfer_id} is booked and not in the file"


def wrong_balances(
    opening: dict[str, int], to_book: list[Transfer], accounts: list[Account], entries: list[Entry]
) -> Iterator[str]:
    """Tell each account that does not hold, to the cent, what its entries and the file say."""
    by_file, by_entries = Counter(opening), Counter(opening)
    for transfer in to_book:
        by_file[transfer.source] -= transfer.cents
        by_file[transfer.target] += transfer.cents
    for entry in entries:
        by_entries[entry.account_id] += entry.cents
    if {account.account_id: account.opening_cents for account in accounts} != opening:
        yield "the accounts or their opening balances are not those of the file"
    for account_id, _, balance in accounts:
        if not balance == by_entries[account_id] == by_file[account_id]:
            made = f"its entries make {by_entries[account_id]}, the file makes {by_file[account_id]}"
            yield f"{account_id} holds {balance} cents; {made}"
        if balance < 0:
            yield f"{account_id} is overdrawn: {balance} cents"
    if difference := sum(account.balance_cents for account in accounts) - sum(opening.values()):
        yield f"all accounts together hold {difference} cents more than at the opening"


def findings(dsn: str, folder: Path) -> tuple[list[str], str]:
    """Return everything that is wrong, and a sentence about what is there."""
    opening, transfers = read(folder)
    with psycopg.connect(dsn) as connection:
        connection.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ  # one moment for both tables
        accounts = connection.cursor(row_factory=class_row(Account)).execute("TABLE ledger.account").fetchall()
        entries = (
            connection.cursor(row_factory=class_row(Entry))
            .execute("SELECT transfer_id, account_id, cents FROM ledger.entry")
            .fetchall()
        )
    to_book = covered(opening, transfers)
    wrong = [
        *wrong_bookings(transfers, to_book, entries),
        *wrong_balances(opening, to_book, accounts, entries),
    ]
    if len({transfer.transfer_id for transfer in transfers}) < len(transfers):
        wrong.append("the file has a transfer twice")
    held = sum(account.balance_cents for account in accounts)
    return wrong, (
        f"of {len(transfers):,} transfers in the file {len(to_book):,} are covered; {len(entries):,} entries sum to "
        f"{sum(entry.cents for entry in entries)}; {len(accounts)} accounts hold {held:,} cents, "
        f"{sum(opening.values()):,} at the opening"
    )


def main(arguments: list[str]) -> int:
    """Print the proof, or what is wrong."""
    wrong, summary = findings(arguments[0], Path(arguments[1]) if arguments[1:] else Path(__file__).parent)
    print(summary)
    print("\n".join(wrong[:20]) or "balanced to the cent, and no transfer booked twice")
    if wrong[20:]:
        print(f"and {len(wrong) - 20} more")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
