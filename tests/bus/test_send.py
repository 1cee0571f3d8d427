"""`send`: what is kept, ids that come twice, and what is refused."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import Any
from uuid import UUID, uuid4

import pytest

from commandbus import (
    CommandBus,
    CommandIdConflictError,
    CommandStatus,
    InvalidCommandError,
    Receipt,
)
from tests.bus.support import DOMAIN, Connection, bring, fail, ids, lease, one
from tests.support import Route


async def test_what_is_sent_is_kept_as_it_is(bus: CommandBus) -> None:
    data = {"amount": 10, "note": "ä😀 \\u0041", "list": [1, 2.5, None, True], "": {}}
    receipt = await bus.send(
        DOMAIN,
        "Debit",
        data,
        correlation_id="c-1",
        reply_to="replies",
        max_attempts=7,
        priority=-5,
        headers={"who": "ana"},
    )
    command = await bus.get_command(receipt)
    assert receipt == Receipt(DOMAIN, receipt.command_id, duplicate=False)
    assert (command.domain, command.command_type, command.data) == (DOMAIN, "Debit", data)
    assert (command.correlation_id, command.reply_to, command.max_attempts) == ("c-1", "replies", 7)
    assert (command.priority, command.headers, command.status) == (-5, {"who": "ana"}, CommandStatus.PENDING)
    assert (command.attempts, command.crashes, command.delivery) == (0, 0, 0)
    assert command.sent_at.utcoffset() is not None


async def test_data_is_any_json(bus: CommandBus) -> None:
    values: list[object] = [None, 0, "", [], {}, False, 0.1, -1e-7, 2**64, [[[]]]]
    for data in values:
        assert (await bus.get_command(await bus.send(DOMAIN, "Debit", data))).data == data


async def test_ids_of_the_library_are_new_and_grow(bus: CommandBus) -> None:
    found = [(await bus.send(DOMAIN, "Debit", n)).command_id for n in range(20)]
    assert sorted(set(found)) == found
    assert {command_id.version for command_id in found} == {7}


async def test_a_delay_schedules(bus: CommandBus) -> None:
    delay = timedelta(hours=1, milliseconds=250)
    command = await bus.get_command(await bus.send(DOMAIN, "Debit", {}, delay=delay))
    assert command.status == CommandStatus.SCHEDULED
    assert command.not_before is not None
    assert command.not_before == command.due_at == command.sent_at + delay


async def test_no_delay_is_now(bus: CommandBus) -> None:
    command = await bus.get_command(await bus.send(DOMAIN, "Debit", {}, delay=timedelta(0)))
    assert command.status == CommandStatus.PENDING


# ---------------------------------------------------------------------------------- the same id again


async def test_the_same_command_again_is_a_duplicate(bus: CommandBus, db: Connection) -> None:
    own = uuid4()
    first = await bus.send(DOMAIN, "Debit", {"a": 1, "b": 2}, command_id=own)
    again = await bus.send(DOMAIN, "Debit", {"b": 2, "a": 1}, command_id=own, priority=3)
    assert (first, again) == (Receipt(DOMAIN, own), Receipt(DOMAIN, own, duplicate=True))
    assert ids(db) == [own]
    assert (await bus.get_command(first)).priority == 0


@pytest.mark.parametrize(("command_type", "data"), [("Debit", {"a": 2}), ("Credit", {"a": 1})])
async def test_other_contents_under_the_same_id_conflict(
    bus: CommandBus, db: Connection, command_type: str, data: object
) -> None:
    own = uuid4()
    await bus.send(DOMAIN, "Debit", {"a": 1}, command_id=own)
    with pytest.raises(CommandIdConflictError, match=str(own)) as caught:
        await bus.send(DOMAIN, command_type, data, command_id=own)
    assert caught.value.command_id == own
    assert (await bus.get_command(DOMAIN, own)).data == {"a": 1}
    assert ids(db) == [own]


async def test_an_id_belongs_to_its_domain(bus: CommandBus) -> None:
    own = uuid4()
    for domain in (DOMAIN, "shipping"):
        assert not (await bus.send(domain, "Debit", domain, command_id=own)).duplicate
    assert (await bus.get_command("shipping", own)).data == "shipping"


@pytest.mark.parametrize("status", ["COMPLETED", "FAILED", "CANCELED"])
async def test_a_finished_command_is_still_known(bus: CommandBus, db: Connection, status: str) -> None:
    own = uuid4()
    await bus.send(DOMAIN, "Debit", {"a": 1}, command_id=own)
    bring(db, "Debit", status)
    assert (await bus.send(DOMAIN, "Debit", {"a": 1}, command_id=own)).duplicate
    with pytest.raises(CommandIdConflictError):
        await bus.send(DOMAIN, "Debit", {"a": 2}, command_id=own)
    assert (await bus.get_command(DOMAIN, own)).status == status
    assert len(ids(db)) == 1


async def test_an_edit_does_not_change_what_was_first_sent(bus: CommandBus, db: Connection) -> None:
    own = uuid4()
    await bus.send(DOMAIN, "Debit", {"a": 1}, command_id=own)
    fail(db, lease(db, "Debit"), "PERMANENT")
    db.execute("SELECT commandbus.operator_retry_v1(%s, %s, 'ana', NULL, '{\"a\": 2}')", [DOMAIN, own])
    assert (await bus.get_command(DOMAIN, own)).data == {"a": 2}
    assert (await bus.send(DOMAIN, "Debit", {"a": 1}, command_id=own)).duplicate
    with pytest.raises(CommandIdConflictError):
        await bus.send(DOMAIN, "Debit", {"a": 2}, command_id=own)


async def test_of_many_at_once_one_is_first(bus: CommandBus, db: Connection) -> None:
    own = uuid4()
    receipts = await asyncio.gather(*(bus.send(DOMAIN, "Debit", {}, command_id=own) for _ in range(50)))
    assert [receipt.duplicate for receipt in receipts].count(False) == 1
    assert ids(db) == [own]


async def test_of_many_at_once_with_other_data_one_wins(bus: CommandBus, db: Connection) -> None:
    own = uuid4()
    sends = [bus.send(DOMAIN, "Debit", n, command_id=own) for n in range(20)]
    outcomes = await asyncio.gather(*sends, return_exceptions=True)
    won = [n for n, outcome in enumerate(outcomes) if isinstance(outcome, Receipt)]
    assert len(won) == 1
    assert sum(isinstance(outcome, CommandIdConflictError) for outcome in outcomes) == 19
    assert (await bus.get_command(DOMAIN, own)).data == won[0]


# ------------------------------------------------------------------------------------ what is refused


def _nested(depth: int) -> list[Any]:
    data: list[Any] = []
    for _ in range(depth):
        data = [data]
    return data


WRONG: dict[str, tuple[str, object]] = {
    "domain empty": ("domain", ""),
    "domain with a space": ("domain", "a b"),
    "domain too long": ("domain", "x" * 129),
    "no domain": ("domain", None),
    "type with a newline": ("command_type", "a\n"),
    "type no text": ("command_type", 5),
    "data an object": ("data", object()),
    "data not a number": ("data", float("nan")),
    "data a set": ("data", {1, 2}),
    "data too deep": ("data", _nested(100_000)),
    "data with NUL": ("data", "\0"),
    "data with a surrogate": ("data", "\ud800"),
    "id no UUID": ("command_id", "not-a-uuid"),
    "correlation with NUL": ("correlation_id", "\0"),
    "reply_to with a space": ("reply_to", "no spaces"),
    "attempts none": ("max_attempts", 0),
    "attempts a bool": ("max_attempts", True),
    "attempts too many": ("max_attempts", 1_000_001),
    "priority too high": ("priority", 101),
    "priority too low": ("priority", -101),
    "priority no int": ("priority", 1.5),
    "delay below zero": ("delay", timedelta(seconds=-1)),
    "delay too long": ("delay", timedelta(days=3651)),
    "header value no text": ("headers", {"a": 1}),
    "header name no text": ("headers", {1: "a"}),
    "header with NUL": ("headers", {"a": "\0"}),
}


async def test_what_cannot_be_a_command_is_refused(bus: CommandBus, db: Connection) -> None:
    for name, (field, value) in WRONG.items():
        arguments: dict[str, Any] = {"domain": DOMAIN, "command_type": "Debit", "data": {}} | {field: value}
        try:
            await bus.send(**arguments)
        except InvalidCommandError as error:
            assert field in str(error) or "PostgreSQL" in str(error), name  # noqa: PT017 - in a loop
        else:
            pytest.fail(f"{name}: it was sent")
    assert one(db, "SELECT count(*) FROM commandbus.commands") == 0
    assert (await bus.send(DOMAIN, "Debit", {})).command_id in ids(db)


async def test_one_sender_after_the_other_never_waits(route: Route, db: Connection) -> None:
    """The end of a flush and the next send meet in one turn of the loop: that send must not be left lying."""
    async with CommandBus(**route, flush_connections=1) as bus, asyncio.timeout(15):
        sent = [(await bus.send(DOMAIN, "Debit", n)).command_id for n in range(200)]
    assert sorted(ids(db)) == sent


@pytest.mark.parametrize("flush_connections", [1, 2, 4])
async def test_no_sender_of_a_crowd_is_left_waiting(route: Route, db: Connection, flush_connections: int) -> None:
    async with CommandBus(**route, flush_connections=flush_connections) as bus, asyncio.timeout(30):

        async def sender() -> list[UUID]:
            return [(await bus.send(DOMAIN, "Debit", n)).command_id for n in range(50)]

        sent = [command_id for found in await asyncio.gather(*(sender() for _ in range(16))) for command_id in found]
    assert sorted(ids(db)) == sorted(sent)
