"""Results and errors that break a limit are recorded; what the database or Python refuses harms no neighbour."""

from __future__ import annotations

from typing import Any

import pytest

from commandbus import (
    BusinessRuleError,
    Command,
    CommandBus,
    CommandStatus,
    HandlerContext,
    PermanentCommandError,
    Receipt,
    SendRequest,
    TransientCommandError,
    Worker,
)
from commandbus._limits import MAX_BYTES
from tests.bus.support import DOMAIN, Connection, rows
from tests.support import nested
from tests.worker.support import PARKED, all_settled, echo, registry_of, running, settled

RESULTS: dict[str, Any] = {
    "NUL": "a\0b",
    "surrogate": "\ud800",
    "too deep": nested(65),
    "much too deep": nested(100_000),
    "a long integer": 10**5000,
    "not a number": float("nan"),
    "an object": object(),
    "bytes": b"x",
    "a key": {(1, 2): 3},
    "too large": "x" * MAX_BYTES,
}


async def test_a_result_that_cannot_be_kept_is_replaced_and_its_command_completed(
    bus: CommandBus, caplog: pytest.LogCaptureFixture
) -> None:
    async def result(command: Command, context: HandlerContext) -> Any:  # noqa: ANN401 - any JSON
        return RESULTS.get(command.data, command.data)

    batch = [SendRequest(DOMAIN, "Debit", n) for n in range(200)]
    sent = await bus.send_batch([*batch, *(SendRequest(DOMAIN, "Debit", name) for name in RESULTS), *batch])
    async with running(Worker(bus, DOMAIN, registry_of(Debit=result), concurrency=500)):
        commands = await all_settled(bus, sent)
    for command in commands:
        assert (command.status, command.delivery, command.attempts) == (CommandStatus.COMPLETED, 1, 1), command.data
        if command.data in RESULTS:
            assert command.result["commandbus"] == "result replaced", command.data
            assert command.result["reason"].startswith("result"), command.data
        else:
            assert command.result == command.data
    assert len([record for record in caplog.records if "breaks a limit" in record.message]) == len(RESULTS)


async def test_a_result_that_only_the_database_refuses_parks_its_command_only(bus: CommandBus, db: Connection) -> None:
    db.execute("ALTER TABLE commandbus.command_history ADD CHECK (result <> '7')")
    sent = await bus.send_batch([SendRequest(DOMAIN, "Debit", n) for n in range(50)])
    async with running(Worker(bus, DOMAIN, registry_of(Debit=echo), concurrency=50)):
        commands = await all_settled(bus, sent)
    (parked,) = [command for command in commands if command.status != CommandStatus.COMPLETED]
    assert (parked.data, parked.status, parked.attempts, parked.crashes, parked.delivery) == (7, PARKED, 1, 0, 1)
    assert parked.error is not None
    assert parked.error.code == "UNSTORABLE"
    assert "PostgreSQL refuses the result" in parked.error.message


async def test_an_error_that_the_database_refuses_is_recorded_in_other_words(bus: CommandBus, db: Connection) -> None:
    """A database in another encoding than UTF-8 does not know every character."""
    verdicts = {"TRANSIENT": TransientCommandError, "PERMANENT": PermanentCommandError, "BUSINESS": BusinessRuleError}

    async def refused(command: Command, context: HandlerContext) -> None:
        raise verdicts[command.data]("WHY", "unheard of")

    for table in ("command", "command_history"):
        db.execute(f"ALTER TABLE commandbus.{table} ADD CHECK (error ->> 'message' <> 'unheard of')".encode())
    async with running(Worker(bus, DOMAIN, registry_of(Debit=refused))):
        for verdict in verdicts:
            command = await settled(bus, await bus.send(DOMAIN, "Debit", verdict, max_attempts=2))
            assert command.status == (CommandStatus.FAILED if verdict == "BUSINESS" else PARKED)
            assert (command.attempts, command.crashes) == (2 if verdict == "TRANSIENT" else 1, 0)
            assert command.error is not None
            assert command.error.code == "UNSTORABLE"
            assert "WHY" in command.error.details["text"]


async def test_data_that_cannot_be_read_parks_its_command_only(bus: CommandBus, db: Connection) -> None:
    """PostgreSQL keeps more than Python reads: 1e5000 comes back as 5,001 digits."""
    bad: list[Receipt] = []
    for text in ("1e5000", '{"a": [1e4999, -1e5001]}'):
        sent = f'[{{"domain":"payments","command_type":"Debit","data":{text}}}]'
        ((command_id,),) = rows(db, "SELECT command_id FROM commandbus.send_v1(%s)", sent)
        bad.append(Receipt(DOMAIN, command_id))
    good = await bus.send_batch([SendRequest(DOMAIN, "Debit", n) for n in range(50)])
    async with running(Worker(bus, DOMAIN, registry_of(Debit=echo))):
        assert {command.status for command in await all_settled(bus, good)} == {CommandStatus.COMPLETED}
        for receipt in bad:
            command = await settled(bus, receipt)
            assert (command.status, command.attempts, command.delivery) == (PARKED, 1, 1)
            assert command.error is not None
            assert command.error.code == "UNREADABLE"
            assert "cannot be read" in command.error.message
        assert (await settled(bus, await bus.send(DOMAIN, "Debit", "after"))).result == "after"
