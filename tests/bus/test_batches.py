"""Batches through the bus: created all or none, counted, watched, cancelled and retried."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest

from commandbus import (
    Batch,
    BatchNotFoundError,
    BusinessRuleError,
    Command,
    CommandBus,
    CommandIdConflictError,
    CommandStateError,
    CommandStatus,
    ConfigurationError,
    HandlerContext,
    InvalidCommandError,
    OutcomeUnknownError,
    PermanentCommandError,
    Receipt,
    SendRequest,
    Worker,
)
from commandbus._database import Database
from tests.bus.support import DOMAIN, Connect, Connection, ids, one, poisonous, rows, terminate, until
from tests.support import async_only
from tests.worker.support import echo, registry_of, running, settled

SOON = timedelta(milliseconds=10)
DONE = SendRequest("reports", "Mail", {"to": "ana"})
WHO = {"operator": "ana", "reason": "looked at it"}


def requests(count: int, command_type: str = "Debit", **more: Any) -> list[SendRequest]:
    return [SendRequest(DOMAIN, command_type, n, **more) for n in range(count)]


def counts(batch: Batch) -> tuple[int, int, int, int, int, int]:
    """Total, completed, failed, canceled, in trouble, open."""
    return batch.total, batch.completed, batch.failed, batch.canceled, batch.in_trouble, batch.open


async def finished(bus: CommandBus, batch: Batch) -> list[Batch]:
    """Watch a batch to its end; returns what was seen."""
    return [seen async for seen in bus.watch_batch(batch.domain, batch.batch_id, interval=SOON)]


# ----------------------------------------------------------------------------------------------- creating


async def test_a_batch_is_sent_and_counted_until_its_last_command_has_ended(bus: CommandBus) -> None:
    async def judge(command: Command, context: HandlerContext) -> None:
        if command.data == 1:
            raise BusinessRuleError("NO")

    batch = await bus.create_batch(DOMAIN, requests(3), name="nightly", on_complete=DONE)
    assert (batch.name, batch.growing, batch.done, batch.progress, batch.duplicate) == (
        "nightly", False, False, 0.0, False,
    )  # fmt: skip
    assert counts(batch) == (3, 0, 0, 0, 0, 3)
    assert batch.on_complete is not None
    async with running(Worker(bus, DOMAIN, registry_of(Debit=judge))):
        seen = await finished(bus, batch)
    assert counts(seen[-1]) == (3, 2, 1, 0, 0, 0)
    assert seen[-1].done
    assert seen[-1].progress == 1.0
    assert [one.done for one in seen] == [False] * (len(seen) - 1) + [True]
    last = await bus.get_command(batch.on_complete)
    assert (last.domain, last.command_type, last.data, last.correlation_id) == (
        "reports", "Mail", {"to": "ana"}, str(batch.batch_id),
    )  # fmt: skip


async def test_thousands_of_commands_are_one_transaction(bus: CommandBus, db: Connection) -> None:
    batch = await bus.create_batch(DOMAIN, requests(2500))
    assert one(db, "SELECT count(DISTINCT xmin::text) FROM commandbus.command") == 1
    assert batch.total == 2500
    listed = await bus.list_batch_commands(DOMAIN, batch.batch_id, limit=1000)
    assert [command.data for command in listed] == list(range(1000))
    assert {command.batch_id for command in listed} == {batch.batch_id}


async def test_an_empty_batch_finishes_at_once(bus: CommandBus, db: Connection) -> None:
    batch = await bus.create_batch(DOMAIN, [], on_complete=DONE)
    assert batch.done
    assert batch.progress == 1.0
    assert batch.on_complete is not None
    assert ids(db) == [batch.on_complete.command_id]


async def test_a_refusal_in_a_later_chunk_leaves_nothing(bus: CommandBus, db: Connection) -> None:
    commands = requests(1500)
    commands[1400] = SendRequest(DOMAIN, "Debit", poisonous(db))
    with pytest.raises(InvalidCommandError):
        await bus.create_batch(DOMAIN, commands)
    assert ids(db) == []
    assert (await bus.list_batches()).items == ()


async def test_a_command_that_was_sent_before_is_a_conflict_and_nothing_is_written(
    bus: CommandBus, db: Connection
) -> None:
    before = await bus.send(DOMAIN, "Debit", 0, command_id=uuid4())
    with pytest.raises(CommandIdConflictError, match=str(before.command_id)) as caught:
        await bus.create_batch(DOMAIN, [*requests(2), *requests(1, command_id=before.command_id)])
    assert caught.value.command_id == before.command_id
    assert ids(db) == [before.command_id]
    assert (await bus.list_batches()).items == ()


async def test_a_command_of_another_domain_is_refused_with_its_number(bus: CommandBus, db: Connection) -> None:
    with pytest.raises(InvalidCommandError, match='number 1, is of domain "reports": the batch is of "payments"'):
        await bus.create_batch(DOMAIN, [*requests(1), DONE])
    assert ids(db) == []


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"name": ""}, "name is ''"),
        ({"name": "x" * 257}, "name is"),
        ({"batch_id": "7"}, "batch_id is '7'"),
        ({"on_complete": SendRequest("reports", "Mail", 1, command_id=UUID(int=1))}, "on_complete: its command_id"),
        ({"on_complete": SendRequest("reports", "", 1)}, "command_type is ''"),
    ],
    ids=["an empty name", "a long name", "an id that is none", "an id of on_complete", "an on_complete without type"],
)
async def test_what_cannot_be_a_batch_is_refused(
    bus: CommandBus, db: Connection, wrong: dict[str, Any], words: str
) -> None:
    with pytest.raises(InvalidCommandError, match=words):
        await bus.create_batch(DOMAIN, requests(1), **wrong)
    assert ids(db) == []


# -------------------------------------------------------------------------------------------- idempotence


async def test_the_same_batch_again_sends_nothing(bus: CommandBus, db: Connection) -> None:
    batch_id = uuid4()
    commands = [*requests(2), *requests(1, command_id=uuid4())]
    first = await bus.create_batch(DOMAIN, commands, name="n", on_complete=DONE, batch_id=batch_id)
    again = await bus.create_batch(DOMAIN, commands, name="n", on_complete=DONE, batch_id=batch_id)
    assert (first.duplicate, again.duplicate) == (False, True)
    assert (again.batch_id, again.total, again.on_complete) == (batch_id, 3, first.on_complete)
    assert len(ids(db)) == 3


@pytest.mark.parametrize(
    "other",
    [
        {"name": "m"},
        {"commands": requests(1)},
        {"commands": [*requests(1), SendRequest(DOMAIN, "Debit", 7)]},
        {"commands": [*requests(1), SendRequest(DOMAIN, "Credit", 1)]},
        {"on_complete": SendRequest("reports", "Mail", {"to": "bob"})},
        {"on_complete": None},
        {"growing": True},
    ],
    ids=["name", "fewer", "data", "type", "on_complete", "no on_complete", "growing"],
)
async def test_another_batch_under_the_same_id_is_a_conflict(
    bus: CommandBus, db: Connection, other: dict[str, Any]
) -> None:
    batch_id = uuid4()
    what: dict[str, Any] = {"commands": requests(2), "name": "n", "on_complete": DONE, "batch_id": batch_id}
    await bus.create_batch(DOMAIN, **what)
    with pytest.raises(CommandIdConflictError, match=str(batch_id)):
        await bus.create_batch(DOMAIN, **what | other)
    assert len(ids(db)) == 2


async def test_a_batch_whose_connection_breaks_is_created_once(bus: CommandBus, db: Connection) -> None:
    with psycopg.connect(db.info.dsn) as rival:
        batch_id = uuid4()
        rival.execute("SELECT commandbus.create_batch_v1(%s, %s, NULL, NULL, 'other')", [DOMAIN, batch_id])
        rival.execute("SELECT 1")
        creating = asyncio.create_task(bus.create_batch(DOMAIN, requests(2), batch_id=batch_id))
        await until(lambda: terminate(db, "create_batch_v1"), "the end of the session that creates")
        rival.rollback()
    assert (await creating).total == 2
    assert len(ids(db)) == 2


@async_only("runs a call of its own on the pool")
async def test_a_batch_whose_commit_is_not_answered_is_created_once(
    bus: CommandBus, db: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The transaction that is repeated finds what the first one has done."""
    run, lost = Database.run_steps, [1, 1, 0]

    async def run_and_lose(self: Database, steps: Any) -> Any:  # noqa: ANN401 - passes on
        done = await run(self, steps)
        if lost.pop(0):
            raise psycopg.OperationalError("the connection is lost")
        return done

    monkeypatch.setattr(Database, "run_steps", run_and_lose)
    batch = await bus.create_batch(DOMAIN, requests(2))
    assert (batch.total, batch.duplicate) == (2, False)
    assert len(ids(db)) == 2
    lost += [1, 1, 1]
    with pytest.raises(OutcomeUnknownError) as caught:
        await bus.create_batch(DOMAIN, requests(2))
    assert (await bus.get_batch(DOMAIN, caught.value.command_id)).total == 2


# ------------------------------------------------------------------------------------- the caller's transaction


async def test_a_batch_is_part_of_the_callers_transaction(bus: CommandBus, db: Connection, connect: Connect) -> None:
    caller = connect()
    await bus.create_batch(DOMAIN, requests(2), connection=caller)
    caller.rollback()
    assert ids(db) == []
    batch = await bus.create_batch(DOMAIN, requests(2), on_complete=DONE, connection=caller)
    with pytest.raises(BatchNotFoundError):
        await bus.get_batch(DOMAIN, batch.batch_id)
    caller.commit()
    assert await bus.get_batch(DOMAIN, batch.batch_id) == batch
    assert batch.total == 2


async def test_a_batch_that_is_refused_leaves_the_callers_transaction_as_it_was(
    bus: CommandBus, db: Connection, connect: Connect
) -> None:
    caller = connect()
    receipt = await bus.send(DOMAIN, "Debit", 0, connection=caller)
    with pytest.raises(CommandIdConflictError):
        await bus.create_batch(DOMAIN, requests(1, command_id=receipt.command_id), connection=caller)
    caller.commit()
    assert ids(db) == [receipt.command_id]
    assert (await bus.list_batches()).items == ()


# ------------------------------------------------------------------------------------------------ growing


async def test_a_batch_that_grows_finishes_once_it_is_closed(bus: CommandBus) -> None:
    batch = await bus.create_batch(DOMAIN, requests(1), on_complete=DONE, growing=True)
    async with running(Worker(bus, DOMAIN, registry_of(Debit=echo))):
        batch = await bus.add_to_batch(DOMAIN, batch.batch_id, requests(2))
        assert batch.total == 3
        async for seen in bus.watch_batch(DOMAIN, batch.batch_id, interval=SOON):
            if seen.completed == 3:
                break
        assert not seen.done
        batch = await bus.close_batch(DOMAIN, batch.batch_id)
    assert batch.done
    assert await bus.close_batch(DOMAIN, batch.batch_id) == batch
    with pytest.raises(CommandStateError, match="closed"):
        await bus.add_to_batch(DOMAIN, batch.batch_id, requests(1))


async def test_adding_is_all_or_none(bus: CommandBus, db: Connection) -> None:
    batch = await bus.create_batch(DOMAIN, [], growing=True)
    before = await bus.send(DOMAIN, "Debit", 0, command_id=uuid4())
    with pytest.raises(CommandIdConflictError):
        await bus.add_to_batch(DOMAIN, batch.batch_id, [*requests(1), *requests(1, command_id=before.command_id)])
    assert ids(db) == [before.command_id]
    assert (await bus.get_batch(DOMAIN, batch.batch_id)).total == 0


async def test_a_batch_that_is_not_there(bus: CommandBus, db: Connection) -> None:
    nobody = uuid4()
    for call in (bus.get_batch, bus.close_batch, bus.cancel_batch):
        with pytest.raises(BatchNotFoundError, match=str(nobody)):
            await call(DOMAIN, nobody)
    with pytest.raises(BatchNotFoundError):
        await bus.add_to_batch(DOMAIN, nobody, requests(1))
    with pytest.raises(BatchNotFoundError):
        await bus.retry_batch(DOMAIN, nobody, **WHO)
    with pytest.raises(BatchNotFoundError):
        async for _ in bus.watch_batch(DOMAIN, nobody):
            pass
    assert ids(db) == []


# ------------------------------------------------------------------------------------------------ reading


async def test_batches_are_listed_the_newest_first(bus: CommandBus) -> None:
    open_ = [await bus.create_batch(DOMAIN, requests(1), name=name) for name in ("a", "b")]
    ended = await bus.create_batch("other", [])
    listed = await bus.list_batches()
    assert [batch.batch_id for batch in listed] == [batch.batch_id for batch in (ended, *reversed(open_))]
    assert (await bus.list_batches(finished=True)).items == (ended,)
    assert [batch.name for batch in await bus.list_batches(domain=DOMAIN, finished=False)] == ["b", "a"]
    page = await bus.list_batches(limit=2)
    rest = await bus.list_batches(limit=2, cursor=page.next_cursor)
    assert [*page, *rest] == list(listed)
    assert rest.next_cursor is None


async def test_the_commands_of_a_batch_are_listed_by_status_and_page(bus: CommandBus) -> None:
    await bus.create_batch(DOMAIN, requests(2))
    batch = await bus.create_batch(DOMAIN, requests(5))
    page = await bus.list_batch_commands(DOMAIN, batch.batch_id, limit=3)
    rest = await bus.list_batch_commands(DOMAIN, batch.batch_id, limit=3, cursor=page.next_cursor)
    assert [command.data for command in (*page, *rest)] == [0, 1, 2, 3, 4]
    await bus.cancel(Receipt(DOMAIN, page.items[1].command_id))
    canceled = await bus.list_batch_commands(DOMAIN, batch.batch_id, status=CommandStatus.CANCELED)
    assert [command.data for command in canceled] == [1]
    with pytest.raises(InvalidCommandError, match="status"):
        await bus.list_batch_commands(DOMAIN, batch.batch_id, status="GONE")  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------- cancelling, retrying


async def test_a_batch_is_cancelled(bus: CommandBus, db: Connection) -> None:
    batch = await bus.create_batch(DOMAIN, requests(450), on_complete=DONE, growing=True)
    result = await bus.cancel_batch(DOMAIN, batch.batch_id, **WHO)
    assert (result.done, result.changed, result.busy) == (450, 0, 0)
    batch = await bus.get_batch(DOMAIN, batch.batch_id)
    assert counts(batch) == (450, 0, 0, 450, 0, 0)
    assert batch.done
    assert one(db, "SELECT count(*) FROM commandbus.commands WHERE domain = 'reports'") == 1
    assert (await bus.cancel_batch(DOMAIN, batch.batch_id, **WHO)).done == 0
    assert rows(db, "SELECT DISTINCT operator, reason FROM commandbus.audit_trail WHERE event = 'CANCELED'") == [
        ("ana", "looked at it")
    ]


@pytest.mark.parametrize(
    "who", [{"operator": 5}, {"reason": "NUL\0"}], ids=["an operator that is none", "a reason with a NUL"]
)
async def test_who_cannot_be_kept_is_refused_before_the_batch_is_closed(bus: CommandBus, who: dict[str, Any]) -> None:
    batch = await bus.create_batch(DOMAIN, requests(1), growing=True)
    with pytest.raises(InvalidCommandError, match=f"batch {batch.batch_id}: {next(iter(who))} "):
        await bus.cancel_batch(DOMAIN, batch.batch_id, **WHO | who)
    assert await bus.get_batch(DOMAIN, batch.batch_id) == batch


async def test_the_parked_commands_of_a_batch_are_put_back(bus: CommandBus) -> None:
    well = False

    async def judge(command: Command, context: HandlerContext) -> None:
        if not well and command.data != 0:
            raise PermanentCommandError("BROKEN")

    other = await bus.send(DOMAIN, "Debit", 9)
    batch = await bus.create_batch(DOMAIN, requests(3), on_complete=DONE)
    async with running(Worker(bus, DOMAIN, registry_of(Debit=judge))):
        async for seen in bus.watch_batch(DOMAIN, batch.batch_id, interval=SOON):
            if not seen.open:
                break
        assert counts(seen) == (3, 1, 0, 0, 2, 0)
        assert not seen.done
        well = True
        result = await bus.retry_batch(DOMAIN, batch.batch_id, **WHO)
        assert result.done == 2
        assert counts((await finished(bus, batch))[-1]) == (3, 3, 0, 0, 0, 0)
    assert (await bus.get_command(other)).status == CommandStatus.IN_TROUBLESHOOTING_QUEUE


async def test_the_end_of_a_batch_is_handled_by_a_worker(bus: CommandBus) -> None:
    batch = await bus.create_batch(DOMAIN, requests(20), on_complete=SendRequest(DOMAIN, "Report", 1))
    assert batch.on_complete is not None
    async with running(Worker(bus, DOMAIN, registry_of(Debit=echo, Report=echo))):
        await finished(bus, batch)
        assert (await settled(bus, batch.on_complete)).status == CommandStatus.COMPLETED
    assert (await bus.get_batch(DOMAIN, batch.batch_id)).done


@pytest.mark.parametrize("interval", [timedelta(0), timedelta(seconds=-1), 1], ids=["none", "below zero", "a number"])
async def test_watching_without_a_pause_is_refused_before_anything_is_read(bus: CommandBus, interval: Any) -> None:  # noqa: ANN401
    with pytest.raises(ConfigurationError, match=r"interval is .*: it must be a timedelta above zero"):
        async for _ in bus.watch_batch(DOMAIN, uuid4(), interval=interval):
            pass


@async_only("cancels a task")
async def test_watching_looks_no_more_often_than_it_is_told_to(bus: CommandBus) -> None:
    batch = await bus.create_batch(DOMAIN, requests(1), growing=True)
    watched = bus.watch_batch(DOMAIN, batch.batch_id, interval=timedelta(hours=1))
    assert (await anext(watched)).total == 1
    await bus.add_to_batch(DOMAIN, batch.batch_id, requests(1))
    following = asyncio.ensure_future(anext(watched))
    for _ in range(20):
        await bus.get_batch(DOMAIN, batch.batch_id)
    assert not following.done()
    following.cancel()
