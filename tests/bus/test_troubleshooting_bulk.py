"""Troubleshooting in bulk: what is found, what is acted on, and what is known when it ends early."""

from __future__ import annotations

import asyncio
import json
from datetime import timedelta
from typing import Any
from uuid import UUID

import psycopg
import pytest

from commandbus import (
    BulkResult,
    CommandBus,
    CommandStateError,
    InvalidCommandError,
    SendRequest,
    TroubleshootingFilter,
    TroubleshootingQueue,
    _bulk,
    _desk_calls,
    _queries,
)
from tests.bus.support import DOMAIN, Connect, Connection, lock_table, one, rows, terminate, until
from tests.support import Route, async_only

EVERYTHING = TroubleshootingFilter(DOMAIN)
WHO: dict[str, Any] = {"operator": "ana", "reason": "why"}


@pytest.fixture
def queue(bus: CommandBus) -> TroubleshootingQueue:
    return TroubleshootingQueue(bus)


async def park(
    bus: CommandBus, db: Connection, count: int = 1, *, command_type: str = "Debit", code: str = "X",
    message: str = "m", data: object = None,
) -> list[UUID]:  # fmt: skip
    """Send commands and park them, as a worker would; returns their ids in the order of parking."""
    receipts = await bus.send_batch([SendRequest(DOMAIN, command_type, data or {"n": n}) for n in range(count)])
    return park_pending(db, [receipt.command_id for receipt in receipts], command_type, code, message)


def park_pending(
    db: Connection, ids: list[UUID], command_type: str = "Debit", code: str = "X", message: str = "m"
) -> list[UUID]:
    segments = json.dumps([[command_type, -1, 201 << 54]])
    claim = "SELECT command_id, delivery, lease_token::text FROM commandbus.claim_v1(%s, %s, %s, 'thief', 60)"
    leased = rows(db, claim, DOMAIN, segments, len(ids))[:-1]
    assert {row[0] for row in leased} == set(ids)
    for row in leased:
        item = {"command_id": str(row[0]), "delivery": row[1], "lease_token": row[2], "kind": "PERMANENT"}
        item["error"] = {"code": code, "message": message.replace("ID", str(row[0]))}
        rows(db, "SELECT commandbus.fail_v1(%s, %s)", DOMAIN, json.dumps([item]))
    return [row[0] for row in leased]


def statuses(db: Connection) -> dict[str, int]:
    return dict(rows(db, "SELECT status, count(*) FROM commandbus.commands GROUP BY 1"))


# -- finding -----------------------------------------------------------------------------------------------------------


async def test_failures_are_grouped_by_type_and_kind(
    bus: CommandBus, db: Connection, queue: TroubleshootingQueue
) -> None:
    first = await park(bus, db, 3, code="NO_MONEY", message="command ID lacks 3.50 of 'anna'")
    await park(bus, db, 1, code="NO_MONEY", message="command ID has no account")
    await park(bus, db, 2, command_type="Credit", code="NO_MONEY", message="command ID lacks 70 of 'bob'")

    groups = (await queue.preview(EVERYTHING)).groups

    assert [(g.domain, g.command_type, g.error_code, g.count) for g in groups] == [
        (DOMAIN, "Debit", "NO_MONEY", 3), (DOMAIN, "Credit", "NO_MONEY", 2), (DOMAIN, "Debit", "NO_MONEY", 1),
    ]  # fmt: skip
    assert groups[0].fingerprint == groups[1].fingerprint != groups[2].fingerprint
    assert groups[0].sample_ids == tuple(first)
    assert groups[0].sample_message == f"command {first[0]} lacks 3.50 of 'anna'"
    parked_at = [(await bus.get_command(DOMAIN, command_id)).parked_at for command_id in first]
    assert (groups[0].oldest_parked_at, groups[0].newest_parked_at) == (parked_at[0], parked_at[-1])
    assert (await queue.preview(TroubleshootingFilter(DOMAIN, command_type="Credit"))).groups == groups[1:2]
    assert (await queue.preview(TroubleshootingFilter("shipping"))).groups == ()


@pytest.mark.corrupts
async def test_what_a_filter_finds_is_the_same_everywhere(
    bus: CommandBus, db: Connection, queue: TroubleshootingQueue
) -> None:
    old = await park(bus, db, 2, code="OLD", message="long ago")
    db.execute("UPDATE commandbus.command SET parked_at = parked_at - interval '2 hours'")
    credit = await park(bus, db, 2, command_type="Credit", message="Hundred% of_it")
    debit = await park(bus, db, 1, data={"to": "Änne", "path": r"C:\temp"})
    (group,) = (await queue.preview(TroubleshootingFilter(DOMAIN, error_code="OLD"))).groups

    async def finds(*expected: UUID, **fields: Any) -> None:
        page = await queue.list_troubleshooting(DOMAIN, **fields)
        assert [command.command_id for command in page] == list(expected), fields
        assert (await queue.preview(TroubleshootingFilter(DOMAIN, **fields))).count == len(expected)
        with pytest.raises(CommandStateError, match=f"finds {len(expected)} "):
            await queue.operator_cancel_many(TroubleshootingFilter(DOMAIN, **fields), expected_count=-1, **WHO)

    await finds(*old, *credit, *debit)
    await finds(*old, error_code="OLD")
    await finds(*old, fingerprint=group.fingerprint)
    await finds(*old, parked_for=timedelta(hours=1))
    await finds(parked_for=timedelta(hours=3))
    await finds(*credit, command_type="Credit")
    await finds(*credit, text="hundred% OF_IT")
    await finds(*debit, text='"TO": "Änne"')
    await finds(*debit, text=r"C:\\temp")
    for metacharacters in ("hundred_", "%of", "o%_", r"hundred\%", "' OR true --"):
        await finds(text=metacharacters)
    await finds(*old, error_code="OLD", text="AGO", parked_for=timedelta(0), command_type="Debit")
    await finds(command_type="Credit", error_code="OLD")


async def test_pages_of_a_filter(bus: CommandBus, db: Connection, queue: TroubleshootingQueue) -> None:
    await park(bus, db, 3, code="OTHER")
    ids = await park(bus, db, 5)
    first = await queue.list_troubleshooting(DOMAIN, error_code="X", limit=3)
    rest = await queue.list_troubleshooting(DOMAIN, error_code="X", limit=3, cursor=first.next_cursor)
    assert [command.command_id for command in (*first, *rest)] == ids


async def test_a_preview_of_nothing(queue: TroubleshootingQueue) -> None:
    preview = await queue.preview(EVERYTHING)
    assert (preview.count, preview.oldest_parked_at, preview.newest_parked_at, preview.groups) == (0, None, None, ())


@pytest.mark.parametrize("parked_for", [timedelta(seconds=-1), timedelta.max])
async def test_parked_for_is_a_time_that_can_have_passed(queue: TroubleshootingQueue, parked_for: timedelta) -> None:
    with pytest.raises(InvalidCommandError, match="parked_for"):
        await queue.preview(TroubleshootingFilter(DOMAIN, parked_for=parked_for))


# -- acting ------------------------------------------------------------------------------------------------------------


async def test_retry_of_many_with_a_patch(bus: CommandBus, db: Connection, queue: TroubleshootingQueue) -> None:
    ids = await park(bus, db, 250, data={"amount": 1, "note": "x"})
    other = await park(bus, db, 1, code="OTHER")
    seen: list[BulkResult] = []

    result = await queue.operator_retry_many(
        TroubleshootingFilter(DOMAIN, error_code="X"), expected_count=250, patch={"amount": 2, "note": None},
        on_progress=seen.append, **WHO,
    )  # fmt: skip

    assert result == BulkResult(250, 0, 0, 0, 0)
    assert [so_far.done for so_far in seen] == [*range(32, 250, 32), 250]
    assert statuses(db) == {"PENDING": 250, "IN_TROUBLESHOOTING_QUEUE": 1}
    assert {json.dumps((await bus.get_command(DOMAIN, i)).data) for i in (ids[0], ids[-1])} == {'{"amount": 2}'}
    event = (await bus.get_audit_trail(DOMAIN, ids[7]))[-1]
    assert (event.event, event.operator, event.reason) == ("OPERATOR_RETRIED", "ana", "why")
    assert event.details == {"old_data": {"amount": 1, "note": "x"}, "new_data": {"amount": 2}}
    assert (await bus.get_command(DOMAIN, other[0])).parked_at is not None


async def test_cancel_and_complete_of_many(bus: CommandBus, db: Connection, queue: TroubleshootingQueue) -> None:
    given_up = await park(bus, db, 3, code="OLD")
    by_hand = await park(bus, db, 2)

    canceled = await queue.operator_cancel_many(
        TroubleshootingFilter(DOMAIN, error_code="OLD"), expected_count=3, **WHO
    )
    completed = await queue.operator_complete_many(EVERYTHING, expected_count=2, result_data={"by": "hand"}, **WHO)

    assert (canceled.done, completed.done) == (3, 2)
    assert statuses(db) == {"CANCELED": 3, "COMPLETED": 2}
    assert (await bus.get_command(DOMAIN, by_hand[1])).result == {"by": "hand"}
    assert (await bus.get_audit_trail(DOMAIN, given_up[2]))[-1].operator == "ana"


async def test_a_retry_wakes_the_workers_and_a_cancel_does_not(
    bus: CommandBus, route: Route, db: Connection, connect: Connect, queue: TroubleshootingQueue
) -> None:
    async with CommandBus(**route) as sender:  # which takes the hints that it owes with it
        await park(sender, db, 2)
    listener = connect(autocommit=True)
    listener.execute("LISTEN commandbus")
    (first, _) = (await queue.list_troubleshooting(DOMAIN)).items
    only = TroubleshootingFilter(DOMAIN, text=f'"n": {first.data["n"]}')
    await queue.operator_cancel_many(only, expected_count=1, **WHO)
    await bus.wake("end")
    await queue.operator_retry_many(EVERYTHING, expected_count=1, operator="ana")
    assert [notice.payload for notice in listener.notifies(timeout=5, stop_after=2)] == ["end", DOMAIN]


@pytest.mark.parametrize("expected", [0, 2, 4])
async def test_another_count_than_expected_does_nothing(
    bus: CommandBus, db: Connection, queue: TroubleshootingQueue, expected: int
) -> None:
    await park(bus, db, 3)
    with pytest.raises(CommandStateError, match=f'finds 3 parked commands in "{DOMAIN}", not {expected}'):
        await queue.operator_retry_many(EVERYTHING, expected_count=expected, operator="ana")
    assert statuses(db) == {"IN_TROUBLESHOOTING_QUEUE": 3}


async def test_an_operator_of_many_has_a_name(bus: CommandBus, db: Connection, queue: TroubleshootingQueue) -> None:
    await park(bus, db, 1)
    with pytest.raises(InvalidCommandError, match="no name") as caught:
        await queue.operator_retry_many(EVERYTHING, expected_count=1, operator="")
    assert caught.value.__notes__ == ["0 of 1 commands are done, 1 are not"]
    assert statuses(db) == {"IN_TROUBLESHOOTING_QUEUE": 1}


async def test_the_set_is_fixed_in_pages(
    bus: CommandBus, db: Connection, queue: TroubleshootingQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("commandbus._desk_calls._PARKED_PAGE", 4)
    await park(bus, db, 10)
    assert (await queue.operator_cancel_many(EVERYTHING, expected_count=10, **WHO)).done == 10


@async_only("asks the database itself")
async def test_the_set_is_what_was_parked_at_the_start(bus: CommandBus, db: Connection) -> None:
    """Or its pages would never end while more is parked than read."""
    ids = await park(bus, db, 2)
    start = await bus.database.repeat(_queries.clock())
    await park(bus, db, 2)
    found, _ = await bus.database.repeat(_desk_calls.parked_page(EVERYTHING, start, None))
    assert found == [(command_id, 1) for command_id in ids]
    which = TroubleshootingFilter(DOMAIN, parked_for=timedelta(hours=1))
    assert (await bus.database.repeat(_desk_calls.parked_page(which, start, None)))[0] == []
    late = await bus.database.repeat(_desk_calls.parked_page(which, start + timedelta(hours=1), None))
    assert late == (found, None)


async def test_what_is_parked_later_is_not_acted_on(
    bus: CommandBus, db: Connection, queue: TroubleshootingQueue
) -> None:
    """Neither a new command, nor one of the set that somebody else has retried and that is parked anew."""
    first, second = await park(bus, db, 2)
    late: list[UUID] = []

    def meanwhile(_: BulkResult) -> None:
        if not late:
            rows(db, "SELECT commandbus.operator_retry_v1(%s, %s, 'bob', 'first')", DOMAIN, second)
            park_pending(db, [second])
            late.append(second)

    result = await queue.operator_cancel_many(EVERYTHING, expected_count=2, per_second=10, on_progress=meanwhile, **WHO)

    assert result == BulkResult(1, 1, 0, 0, 0)
    assert (await bus.get_command(DOMAIN, first)).status == "CANCELED"
    assert [event.operator for event in await bus.get_audit_trail(DOMAIN, second) if event.operator] == ["bob"]


async def test_a_locked_command_is_tried_again_at_the_end(
    bus: CommandBus, db: Connection, connect: Connect, queue: TroubleshootingQueue
) -> None:
    ids = await park(bus, db, 5)
    holder = connect()
    rows(holder, "SELECT commandbus.operator_cancel_v1(%s, %s, 'bob', 'no')", DOMAIN, ids[0])
    seen: list[BulkResult] = []

    def look(so_far: BulkResult) -> None:
        seen.append(so_far)
        if len(seen) == 2:
            holder.rollback()

    result = await queue.operator_retry_many(EVERYTHING, expected_count=5, on_progress=look, **WHO)

    assert result == BulkResult(5, 0, 0, 0, 0)
    assert seen == [BulkResult(4, 0, 0, 1, 0), BulkResult(4, 0, 0, 1, 0), result]


async def test_a_command_that_stays_locked_is_left_alone(
    bus: CommandBus, db: Connection, connect: Connect, queue: TroubleshootingQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_bulk, "_BUSY_PAUSES", (0, 0))
    ids = await park(bus, db, 5)
    holder = connect()
    rows(holder, "SELECT commandbus.operator_cancel_v1(%s, %s, 'bob', 'no')", DOMAIN, ids[3])
    assert await queue.operator_retry_many(EVERYTHING, expected_count=5, **WHO) == BulkResult(4, 0, 0, 1, 0)


async def test_what_a_patch_would_make_too_large_is_counted_as_refused(
    bus: CommandBus, db: Connection, queue: TroubleshootingQueue
) -> None:
    """In one batch with others, which it does not hold up."""
    (large,) = await park(bus, db, 1, data={"n": "x" * 262_100})
    await park(bus, db, 3)

    result = await queue.operator_retry_many(EVERYTHING, expected_count=4, patch={"a": "y" * 40}, **WHO)

    assert result == BulkResult(3, 0, 1, 0, 0)
    assert (await bus.get_command(DOMAIN, large)).status == "IN_TROUBLESHOOTING_QUEUE"


async def test_what_is_written_anew_goes_in_batches_of_some_megabytes(
    bus: CommandBus, db: Connection, queue: TroubleshootingQueue
) -> None:
    """With a patch as many as fit if each is as large as the database allows, with a result as many as it fits."""
    seen: list[int] = []
    act: dict[str, Any] = {"on_progress": lambda result: seen.append(result.done)} | WHO
    await park(bus, db, 10)
    await queue.operator_complete_many(EVERYTHING, expected_count=10, result_data="x" * 1_000_000, **act)
    assert seen == [8, 10]
    seen.clear()
    await park(bus, db, 40)
    await queue.operator_retry_many(EVERYTHING, expected_count=40, patch={"a": 1}, **act)
    assert seen == [32, 40]


# -- ending early ------------------------------------------------------------------------------------------------------


async def test_on_progress_stops_it(bus: CommandBus, db: Connection, queue: TroubleshootingQueue) -> None:
    await park(bus, db, 10)
    result = await queue.operator_cancel_many(
        EVERYTHING, expected_count=10, per_second=30, on_progress=lambda so_far: so_far.done < 6, **WHO
    )
    assert result == BulkResult(6, 0, 0, 0, 4)
    assert statuses(db) == {"CANCELED": 6, "IN_TROUBLESHOOTING_QUEUE": 4}


async def waiting(db: Connection) -> None:
    """Come back when a batch waits for a lock inside PostgreSQL."""
    sql = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query LIKE '%%operator_bulk_v1%%'"
    await until(lambda: one(db, sql), "a batch that waits for a lock")


@async_only("cancels a task")
async def test_cancelling_lets_the_batch_under_way_end(
    bus: CommandBus, db: Connection, connect: Connect, queue: TroubleshootingQueue
) -> None:
    await park(bus, db, 250)
    holder = connect()
    lock_table(holder, "audit_event")
    seen: list[BulkResult] = []
    task = asyncio.ensure_future(
        queue.operator_retry_many(EVERYTHING, expected_count=250, on_progress=seen.append, **WHO)
    )
    await waiting(db)
    task.cancel()
    await asyncio.sleep(0)
    assert not task.done()
    holder.rollback()
    with pytest.raises(asyncio.CancelledError) as caught:
        await task
    assert caught.value.__notes__ == ["200 of 250 commands are done, 50 are not"]
    assert seen == [BulkResult(200, 0, 0, 0, 50)]
    assert statuses(db) == {"PENDING": 200, "IN_TROUBLESHOOTING_QUEUE": 50}


@async_only("cancels a task")
async def test_cancelling_between_two_batches_ends_it_at_once(
    bus: CommandBus, db: Connection, queue: TroubleshootingQueue
) -> None:
    await park(bus, db, 3)
    seen: list[BulkResult] = []
    task = asyncio.ensure_future(
        queue.operator_cancel_many(EVERYTHING, expected_count=3, per_second=0.001, on_progress=seen.append, **WHO)
    )
    await until(lambda: seen, "the first batch")
    task.cancel()
    with pytest.raises(asyncio.CancelledError) as caught:
        await task
    assert caught.value.__notes__ == ["1 of 3 commands are done, 2 are not"]


@async_only("cancels a task")
@pytest.mark.parametrize("ends", ["cancelled twice", "connection broken"])
async def test_of_a_batch_that_is_broken_off_it_says_that_it_does_not_know(
    bus: CommandBus, db: Connection, connect: Connect, queue: TroubleshootingQueue, ends: str
) -> None:
    await park(bus, db, 250)
    holder = connect()
    lock_table(holder, "audit_event")
    task = asyncio.ensure_future(queue.operator_retry_many(EVERYTHING, expected_count=250, **WHO))
    await waiting(db)
    if ends == "cancelled twice":
        task.cancel()
        await asyncio.sleep(0)
        task.cancel()
    else:
        terminate(db, "operator_bulk_v1")
    with pytest.raises((asyncio.CancelledError, psycopg.OperationalError)) as caught:
        await task
    assert caught.value.__notes__ == ["0 of 250 commands are done, 50 are not; of 200 more it is not known"]


async def test_what_postgresql_refuses_is_not_done(
    bus: CommandBus, db: Connection, queue: TroubleshootingQueue
) -> None:
    await park(bus, db, 3)
    db.execute("ALTER TABLE commandbus.command ADD CONSTRAINT open CHECK (data::text NOT LIKE '%secret%')")
    with pytest.raises(InvalidCommandError, match="a batch of commands was refused by PostgreSQL") as caught:
        await queue.operator_retry_many(EVERYTHING, expected_count=3, patch={"a": "secret"}, **WHO)
    assert "secret" not in str(caught.value)
    assert caught.value.__notes__ == ["0 of 3 commands are done, 3 are not"]
    assert statuses(db) == {"IN_TROUBLESHOOTING_QUEUE": 3}
