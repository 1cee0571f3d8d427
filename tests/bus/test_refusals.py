"""One flush carries the sends of many: each caller hears of its own, and of nothing else."""

from __future__ import annotations

import asyncio
import random
import traceback
from uuid import UUID

import pytest

from commandbus import CommandBus, InvalidCommandError, Receipt, SchemaError
from tests.bus.support import DOMAIN, Connection, ids, one, poisonous


async def test_a_poison_batch(bus: CommandBus, db: Connection) -> None:
    """32 tasks, 6,400 sends, 100 refused by the database: exactly those callers get an error, their own."""
    poison, text = set(random.sample(range(6400), 100)), poisonous(db)
    errors: dict[int, BaseException] = {}
    receipts: dict[int, UUID] = {}

    async def sender(numbers: range) -> None:
        for n in numbers:
            data = {"n": n, "text": text if n in poison else "fine"}
            try:
                receipts[n] = (await bus.send(DOMAIN, "Debit", data)).command_id
            except InvalidCommandError as error:
                errors[n] = error

    await asyncio.gather(*(sender(range(task, 6400, 32)) for task in range(32)))
    assert set(errors) == poison
    assert len(receipts) == 6300
    found: dict[int, UUID] = dict(
        db.execute("SELECT (data ->> 'n')::int, command_id FROM commandbus.command").fetchall()
    )
    assert found == receipts
    assert len({id(error) for error in errors.values()}) == 100
    named = [str(error).split()[1].rstrip(":") for error in errors.values()]  # "command <id>: data is ..."
    assert len({UUID(name) for name in named} - set(receipts.values())) == 100


async def test_the_innocent_of_one_flush_are_sent_together_with_the_guilty(bus: CommandBus, db: Connection) -> None:
    poison = poisonous(db)
    sends = [bus.send(DOMAIN, "Debit", poison if n % 64 == 5 else n) for n in range(640)]
    outcomes = await asyncio.gather(*sends, return_exceptions=True)
    assert [n for n, o in enumerate(outcomes) if isinstance(o, InvalidCommandError)] == list(range(5, 640, 64))
    assert sum(isinstance(outcome, Receipt) for outcome in outcomes) == 630
    assert one(db, "SELECT count(*) FROM commandbus.command") == 630


@pytest.mark.parametrize("fault", ["a row", "the schema"])
async def test_each_caller_gets_an_object_of_its_own(bus: CommandBus, db: Connection, fault: str) -> None:
    """One object raised in 50 tasks would carry 50 tracebacks."""
    poison = poisonous(db)
    if fault == "the schema":
        db.execute("DROP FUNCTION commandbus.send_v1")

    async def send() -> BaseException:
        try:
            await bus.send(DOMAIN, "Debit", poison)
        except (InvalidCommandError, SchemaError) as error:
            return error
        raise AssertionError("it was sent")

    errors = await asyncio.gather(*(send() for _ in range(50)))
    assert len({id(error) for error in errors}) == 50
    assert len({len(traceback.extract_tb(error.__traceback__)) for error in errors}) == 1
    assert len(traceback.extract_tb(errors[0].__traceback__)) < 8
    assert ids(db) == []
    expected = SchemaError if fault == "the schema" else InvalidCommandError
    assert {type(error) for error in errors} == {expected}
