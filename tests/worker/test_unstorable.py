"""Results that PostgreSQL refuses and data that Python cannot read harm no neighbour."""

from __future__ import annotations

import json
from typing import Any

from commandbus import Command, CommandBus, CommandStatus, HandlerContext, Receipt, SendRequest, Worker
from tests.bus.support import DOMAIN, Connection, rows
from tests.worker.support import PARKED, all_settled, echo, registry_of, running, settled


def _nested(depth: int) -> list[Any]:
    found: list[Any] = []
    for _ in range(depth):
        found = [found]
    return found


RESULTS: dict[str, Any] = {
    "NUL": "a\0b",
    "surrogate": "\ud800",
    "too deep": _nested(100_000),
    "deeper than PostgreSQL": None,
    "not a number": float("nan"),
    "an object": object(),
    "bytes": b"x",
    "a key": {(1, 2): 3},
}


async def test_a_result_that_cannot_be_kept_parks_its_command_only(bus: CommandBus) -> None:
    async def result(command: Command, context: HandlerContext) -> Any:  # noqa: ANN401 - any JSON
        return RESULTS.get(command.data, command.data)

    batch = [SendRequest(DOMAIN, "Debit", n) for n in range(200)]
    sent = await bus.send_batch([*batch, *(SendRequest(DOMAIN, "Debit", name) for name in RESULTS), *batch])
    async with running(Worker(bus, DOMAIN, registry_of(Debit=result), concurrency=500)):
        commands = await all_settled(bus, sent)
        assert (await settled(bus, await bus.send(DOMAIN, "Debit", "after"))).result == "after"
    for command in commands:
        if isinstance(command.data, int):
            assert (command.status, command.result, command.delivery) == ("COMPLETED", command.data, 1)
    bad = {command.data: command for command in commands if command.data in RESULTS}
    assert bad.pop("deeper than PostgreSQL").status == CommandStatus.COMPLETED  # None: a control
    for name, command in bad.items():
        assert (command.status, command.attempts, command.crashes, command.delivery) == (PARKED, 1, 0, 1), name
        assert command.error is not None, name
        assert command.error.code in {"UNSTORABLE", "RESULT_NOT_JSON"}, name
        assert len(command.error.message) > 10, name
    assert bad["NUL"].error is not None
    assert "PostgreSQL refuses the result" in bad["NUL"].error.message


def _readable(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


async def test_data_that_cannot_be_read_parks_its_command_only(bus: CommandBus, db: Connection) -> None:
    """PostgreSQL keeps more than Python reads: 1e5000 comes back as 5,001 digits."""
    texts = {
        "1e5000": "1" + "0" * 5000,
        "[" * 2000 + "]" * 2000: "[" * 2000 + "]" * 2000,  # newer versions of Python read this
        '{"a": [1e4999, -1e5001]}': "1" + "0" * 5000,
    }
    bad: list[tuple[Receipt, str]] = []
    for text, written in texts.items():
        sent = f'[{{"domain":"payments","command_type":"Debit","data":{text}}}]'
        ((command_id,),) = rows(db, "SELECT command_id FROM commandbus.send_v1(%s)", sent)
        bad.append((Receipt(DOMAIN, command_id), written))
    headers = '[{"domain":"payments","command_type":"Debit","data":1,"headers":{"a":1e5000}}]'
    ((command_id,),) = rows(db, "SELECT command_id FROM commandbus.send_v1(%s)", headers)
    bad.append((Receipt(DOMAIN, command_id), "1" + "0" * 5000))
    good = await bus.send_batch([SendRequest(DOMAIN, "Debit", n) for n in range(50)])
    async with running(Worker(bus, DOMAIN, registry_of(Debit=echo))):
        assert {command.status for command in await all_settled(bus, good)} == {CommandStatus.COMPLETED}
        for receipt, written in bad:
            command = await settled(bus, receipt)
            if _readable(written):
                continue
            assert (command.status, command.attempts, command.delivery) == (PARKED, 1, 1)
            assert command.error is not None
            assert command.error.code == "UNREADABLE"
            assert "cannot be read" in command.error.message
        assert (await settled(bus, await bus.send(DOMAIN, "Debit", "after"))).result == "after"
