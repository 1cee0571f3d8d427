"""`send_batch`: chunks, and what a caller is told when one of them fails."""

from __future__ import annotations

from typing import Any
from uuid import uuid4

import pytest

from commandbus import (
    CommandBus,
    CommandIdConflictError,
    DatabaseUnavailableError,
    InvalidCommandError,
    PartialSendError,
    Receipt,
    SendRequest,
)
from commandbus._calls import Call
from commandbus._database import Database
from tests.bus.support import DOMAIN, Connection, ids, one, poisonous

TRANSACTIONS = "SELECT count(DISTINCT xmin::text) FROM commandbus.command"


def requests(count: int, **wrong: object) -> list[SendRequest]:
    """So many requests; `at_7="x"` gives the one with number 7 other data."""
    return [SendRequest(DOMAIN, "Debit", wrong.get(f"at_{n}", n)) for n in range(count)]


async def test_a_large_batch_is_sent_in_chunks(bus: CommandBus, db: Connection) -> None:
    receipts = await bus.send_batch(requests(2500))
    assert len(set(receipts)) == 2500
    assert not any(receipt.duplicate for receipt in receipts)
    assert one(db, TRANSACTIONS) == 3
    order = "SELECT command_id FROM commandbus.command ORDER BY (data #>> '{}')::int"
    assert [row[0] for row in db.execute(order)] == [receipt.command_id for receipt in receipts]


async def test_large_data_makes_smaller_chunks(bus: CommandBus, db: Connection) -> None:
    await bus.send_batch([SendRequest(DOMAIN, "Debit", "x" * 240_000) for _ in range(12)])
    assert one(db, TRANSACTIONS) == 3


async def test_an_empty_batch_is_nothing(bus: CommandBus, db: Connection) -> None:
    assert await bus.send_batch([]) == []
    assert ids(db) == []


async def test_all_are_checked_before_the_first_is_sent(bus: CommandBus, db: Connection) -> None:
    with pytest.raises(InvalidCommandError):
        await bus.send_batch(requests(1500, at_1400=float("nan")))
    assert ids(db) == []


async def test_a_refusal_in_a_later_chunk_leaves_the_earlier_ones(bus: CommandBus, db: Connection) -> None:
    poison = poisonous(db)
    with pytest.raises(PartialSendError, match="1000 of 2500") as caught:
        await bus.send_batch(requests(2500, at_1700=poison))
    receipts = caught.value.receipts
    assert len(receipts) == 1000
    assert sorted(ids(db)) == sorted(receipt.command_id for receipt in receipts)
    assert caught.value.__cause__ is not None


async def test_a_refusal_in_the_first_chunk_sends_nothing(bus: CommandBus, db: Connection) -> None:
    poison = poisonous(db)
    with pytest.raises(InvalidCommandError):
        await bus.send_batch(requests(1500, at_3=poison))
    assert ids(db) == []


async def test_a_conflict_is_told_with_the_receipts_of_the_others(bus: CommandBus, db: Connection) -> None:
    own = uuid4()
    await bus.send(DOMAIN, "Debit", "first", command_id=own)
    batch = [*requests(3), SendRequest(DOMAIN, "Debit", "second", command_id=own), *requests(2)]
    with pytest.raises(PartialSendError) as caught:
        await bus.send_batch(batch)
    assert isinstance(caught.value.__cause__, CommandIdConflictError)
    assert caught.value.__cause__.command_id == own
    sent = {receipt.command_id for receipt in caught.value.receipts}
    assert len(sent) == 5
    assert set(ids(db)) == sent | {own}


async def test_a_conflict_alone_is_just_that(bus: CommandBus) -> None:
    own = uuid4()
    await bus.send(DOMAIN, "Debit", 1, command_id=own)
    with pytest.raises(CommandIdConflictError) as caught:
        await bus.send_batch([SendRequest(DOMAIN, "Debit", 2, command_id=own)])
    assert caught.value.command_id == own


async def test_a_batch_sent_twice_is_sent_once(bus: CommandBus, db: Connection) -> None:
    own = [uuid4() for _ in range(1100)]
    batch = [SendRequest(DOMAIN, "Debit", n, command_id=one_id) for n, one_id in enumerate(own)]
    assert await bus.send_batch(batch) == [Receipt(DOMAIN, one_id) for one_id in own]
    assert await bus.send_batch(batch) == [Receipt(DOMAIN, one_id, duplicate=True) for one_id in own]
    assert sorted(ids(db)) == sorted(own)


async def test_an_id_twice_in_one_batch(bus: CommandBus, db: Connection) -> None:
    own = uuid4()
    twice = [SendRequest(DOMAIN, "Debit", 1, command_id=own)] * 2
    assert [receipt.duplicate for receipt in await bus.send_batch(twice)] == [False, True]
    assert ids(db) == [own]


async def test_a_hint_that_cannot_be_given_is_no_failure(
    bus: CommandBus, db: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The commands are durable by then: an error would make the caller send them again."""
    run = Database.run

    async def busy(database: Database, call: Call[Any], *more: Any) -> object:
        if "wake" in call.sql:
            raise DatabaseUnavailableError("busy")
        return await run(database, call, *more)

    monkeypatch.setattr(Database, "run", busy)
    try:
        receipts = await bus.send_batch(requests(3))
    except DatabaseUnavailableError:
        pytest.fail("the batch is durable, and yet it was reported as failed")
    assert sorted(ids(db)) == [receipt.command_id for receipt in receipts]
