"""A ledger that books transfers between accounts, each exactly once.

    commandbus worker ledger:registry

The handler writes through `context.connection`: its two entries and the completion of its command are one
transaction. A worker that is killed in between has written nothing; one that lost its lease cannot commit.
"""

from __future__ import annotations

from datetime import timedelta

from psycopg import AsyncConnection

from commandbus import (
    BusinessRuleError,
    Command,
    HandlerContext,
    HandlerRegistry,
    PermanentCommandError,
    RetryPolicy,
)

registry = HandlerRegistry()

# What is not one of our three verdicts below is trouble with the database, and that is short: try again soon.
_SOON = RetryPolicy(max_attempts=5, backoff=[timedelta(seconds=1)])


@registry.handler("ledger", "BookTransfer", transactional=True, retry=_SOON)
async def book_transfer(command: Command, context: HandlerContext) -> dict[str, int]:
    """Move cents from one account to another.

    Data: `transfer_id`, `source`, `target`, `cents`; all of them text, as they stand in the file. Parks a
    transfer that names no account or no amount: somebody has to look what was meant. One that is not covered
    has FAILED: nobody can repair that, and to try again would let a later deposit decide about it.
    """
    connection = context.connection
    assert connection is not None  # noqa: S101 - a transactional handler has one
    transfer_id, source, target = (command.data[key] for key in ("transfer_id", "source", "target"))
    cents = _cents(command.data["cents"])
    balance = (await _lock(connection, source, target))[source]
    if balance < cents:
        raise BusinessRuleError("INSUFFICIENT_FUNDS", f"{source} has {balance} cents, not {cents}")
    await connection.execute(
        "INSERT INTO ledger.entry (transfer_id, account_id, cents) VALUES (%s, %s, %s), (%s, %s, %s)",
        (transfer_id, source, -cents, transfer_id, target, cents),
    )
    await connection.execute(
        "UPDATE ledger.account SET balance_cents = balance_cents + CASE account_id WHEN %s THEN -%s ELSE %s END "
        "WHERE account_id IN (%s, %s)",
        (source, cents, cents, source, target),
    )
    return {"cents": cents, "source_balance": balance - cents}


def _cents(text: str) -> int:
    """Read an amount; strict, because a wrong guess is somebody's money."""
    if not (text.isascii() and text.isdecimal() and int(text) > 0):
        raise PermanentCommandError("MALFORMED_AMOUNT", f'"{text}" is not a number of cents above zero')
    return int(text)


async def _lock(connection: AsyncConnection, source: str, target: str) -> dict[str, int]:
    """Lock the two accounts, in the order of their ids, so that no two transfers wait for each other.

    Returns their balances, which nobody else can change before this transaction ends.
    """
    if source == target:
        raise PermanentCommandError("SAME_ACCOUNT", f"both sides of the transfer are {source}")
    cursor = await connection.execute(
        "SELECT account_id, balance_cents FROM ledger.account WHERE account_id IN (%s, %s) "
        "ORDER BY account_id FOR UPDATE",
        (source, target),
    )
    balances: dict[str, int] = dict(await cursor.fetchall())
    if missing := [account for account in (source, target) if account not in balances]:
        raise PermanentCommandError("UNKNOWN_ACCOUNT", f"there is no account {', '.join(missing)}")
    return balances
