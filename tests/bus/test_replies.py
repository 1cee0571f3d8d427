"""Replies: waiting for the end of a command, calling, and the commands that carry replies to a domain."""

from __future__ import annotations

import asyncio
import json
from datetime import timedelta
from uuid import UUID, uuid4

import pytest

from commandbus import (
    BusinessRuleError,
    ClosedError,
    Command,
    CommandBus,
    CommandNotFoundError,
    CommandParkedError,
    CommandStatus,
    ConfigurationError,
    Error,
    HandlerContext,
    InvalidCommandError,
    PermanentCommandError,
    Receipt,
    Reply,
    ReplyTimeoutError,
    SendRequest,
    TroubleshootingQueue,
    Worker,
    _database,
    _hints,
    _waits,
)
from commandbus._database import Database
from tests.bus.support import DOMAIN, Connect, Connection, complete, fail, lease, one, rows, terminate, until
from tests.support import Route, async_only, direct_only, nested
from tests.worker.support import echo, registry_of, running

LONG = timedelta(seconds=30)
SHORT = timedelta(milliseconds=50)


async def refuse(command: Command, context: HandlerContext) -> None:
    raise BusinessRuleError("NO_MONEY", "the account is empty", {"balance": 0})


async def park(command: Command, context: HandlerContext) -> None:
    raise PermanentCommandError("ODD", "nobody knows why")


async def looked_for(db: Connection) -> None:
    """Come back when a look for outcomes has run."""
    query = "SELECT count(*) FROM pg_stat_activity WHERE query LIKE '%outcomes_v1%' AND pid <> pg_backend_pid()"
    await until(lambda: one(db, query), "a look for the outcome")


# -------------------------------------------------------------------------------------------- the outcomes


async def test_a_call_returns_what_the_handler_returned(bus: CommandBus) -> None:
    async with running(Worker(bus, DOMAIN, registry_of(Debit=echo))):
        reply = await bus.call(DOMAIN, "Debit", {"n": [1, None]}, timeout=LONG, correlation_id="c")
    assert reply == Reply(
        DOMAIN, reply.command_id, "Debit", CommandStatus.COMPLETED, {"n": [1, None]}, None, correlation_id="c"
    )
    assert (reply.succeeded, reply.failed) == (True, False)


async def test_a_refusal_is_a_reply(bus: CommandBus) -> None:
    async with running(Worker(bus, DOMAIN, registry_of(Debit=refuse))):
        reply = await bus.call(DOMAIN, "Debit", {}, timeout=LONG)
    assert (reply.status, reply.failed, reply.data) == (CommandStatus.FAILED, True, None)
    assert reply.error == Error("NO_MONEY", "the account is empty", {"balance": 0})


async def test_what_is_canceled_is_a_reply(bus: CommandBus) -> None:
    receipt = await bus.send(DOMAIN, "Debit", {})
    waiting = asyncio.create_task(bus.wait(receipt, timeout=LONG))
    await bus.cancel(receipt)
    assert (await waiting).status is CommandStatus.CANCELED
    assert (await waiting).failed


async def test_what_ended_long_ago_is_told(bus: CommandBus, db: Connection) -> None:
    receipt = await bus.send(DOMAIN, "Debit", {})
    assert complete(db, lease(db, "Debit"), {"balance": 1}) == "done"
    assert (await bus.wait(receipt, timeout=LONG)).data == {"balance": 1}
    assert (await bus.wait(DOMAIN, receipt.command_id, timeout=None)).data == {"balance": 1}


async def test_all_who_wait_for_a_command_are_told(bus: CommandBus, route: Route, db: Connection) -> None:
    receipt = await bus.send(DOMAIN, "Debit", {})
    async with CommandBus(**route) as other:
        waiting = [asyncio.create_task(each.wait(receipt, timeout=LONG)) for each in (bus, bus, other)]
        await looked_for(db)
        assert complete(db, lease(db, "Debit"), 7) == "done"
        assert [reply.data for reply in await asyncio.gather(*waiting)] == [7, 7, 7]


async def test_a_call_that_is_sent_again_has_the_reply_of_the_first(bus: CommandBus, db: Connection) -> None:
    command_id = uuid4()
    calls = [asyncio.create_task(bus.call(DOMAIN, "Debit", {}, timeout=LONG, command_id=command_id)) for _ in range(2)]
    await until(lambda: one(db, "SELECT count(*) FROM commandbus.command"), "the command")
    assert complete(db, lease(db, "Debit"), 7) == "done"
    assert [(await each).data for each in calls] == [7, 7]
    assert (await bus.call(DOMAIN, "Debit", {}, timeout=LONG, command_id=command_id)).data == 7


# ------------------------------------------------------------------------------------------- no outcome yet


async def test_a_timeout_names_the_command_which_may_be_waited_for_again(bus: CommandBus, db: Connection) -> None:
    with pytest.raises(ReplyTimeoutError, match="may still end") as caught:
        await bus.call(DOMAIN, "Debit", {}, timeout=SHORT)
    assert complete(db, lease(db, "Debit"), 7) == "done"
    assert (await bus.wait(caught.value.domain, caught.value.command_id, timeout=LONG)).data == 7


async def test_who_waits_for_a_parked_command_may_be_told(bus: CommandBus) -> None:
    async with running(Worker(bus, DOMAIN, registry_of(Debit=park))):
        with pytest.raises(CommandParkedError, match="ODD") as caught:
            await bus.call(DOMAIN, "Debit", {}, timeout=LONG, on_parked="raise")
    receipt = Receipt(DOMAIN, caught.value.command_id)
    with pytest.raises(CommandParkedError):
        await bus.wait(receipt, timeout=LONG, on_parked="raise")
    with pytest.raises(ReplyTimeoutError):
        await bus.wait(receipt, timeout=SHORT)


async def test_a_parked_command_goes_on_for_who_waits(bus: CommandBus, db: Connection) -> None:
    call = asyncio.create_task(bus.call(DOMAIN, "Debit", {}, timeout=LONG))
    await until(lambda: one(db, "SELECT count(*) FROM commandbus.command"), "the command")
    item = lease(db, "Debit")
    assert fail(db, item, "PERMANENT") == "done"
    db.execute("SELECT commandbus.operator_complete_v1(%s, %s, 'ana', 'by hand', '8')", [DOMAIN, item["command_id"]])
    assert (await call).data == 8


async def test_a_command_that_is_not_there_is_not_waited_for(bus: CommandBus) -> None:
    with pytest.raises(CommandNotFoundError):
        await bus.wait(DOMAIN, uuid4(), timeout=LONG)


async def test_one_that_is_not_there_harms_no_other(bus: CommandBus, db: Connection) -> None:
    receipt = await bus.send(DOMAIN, "Debit", {})
    there = asyncio.create_task(bus.wait(receipt, timeout=LONG))
    with pytest.raises(CommandNotFoundError):
        await bus.wait("elsewhere", receipt.command_id, timeout=LONG)
    assert complete(db, lease(db, "Debit"), 7) == "done"
    assert (await there).data == 7


async def test_closing_the_bus_ends_all_waits(route: Route) -> None:
    async with CommandBus(**route) as bus:
        receipt = await bus.send(DOMAIN, "Debit", {})
        waiting = asyncio.create_task(bus.wait(receipt, timeout=None))
        with pytest.raises(ReplyTimeoutError):  # by then the other waits
            await bus.wait(receipt, timeout=SHORT)
    with pytest.raises(ClosedError):
        await waiting


@async_only("cancels a task")
async def test_a_wait_that_is_cancelled_is_forgotten(bus: CommandBus) -> None:
    receipt = await bus.send(DOMAIN, "Debit", {})
    waiting = asyncio.create_task(bus.wait(receipt, timeout=None))
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError) as caught:
        await waiting
    assert any(str(receipt.command_id) in note for note in caught.value.__notes__)
    assert bus._waits._waits == {}


@pytest.mark.parametrize(
    ("how", "error"),
    [
        ({"timeout": timedelta(0)}, ConfigurationError),
        ({"timeout": LONG, "on_parked": "raised"}, ConfigurationError),
        ({"timeout": LONG, "command_id": "7"}, InvalidCommandError),
    ],
    ids=["no time", "an unknown word", "no id"],
)
async def test_what_cannot_be_waited_for_is_refused(
    bus: CommandBus, how: dict[str, object], error: type[Exception]
) -> None:
    with pytest.raises(error):
        await bus.wait(DOMAIN, **{"command_id": uuid4(), **how})  # type: ignore[arg-type]


@pytest.mark.parametrize("address", ["?" + "a" * 32, "?"])
async def test_nobody_else_may_give_an_address(bus: CommandBus, address: str) -> None:
    with pytest.raises(InvalidCommandError, match="reply_to"):
        await bus.send(DOMAIN, "Debit", {}, reply_to=address)


# -------------------------------------------------------------------------------------------- what it costs


@direct_only
async def test_what_listens_may_break_and_comes_back(bus: CommandBus, db: Connection) -> None:
    receipt = await bus.send(DOMAIN, "Debit", {})
    waiting = asyncio.create_task(bus.wait(receipt, timeout=LONG))
    await until(lambda: terminate(db, "LISTEN"), "the listener")
    assert complete(db, lease(db, "Debit"), 7) == "done"
    assert (await waiting).data == 7
    await until(lambda: one(db, "SELECT count(*) FROM pg_stat_activity WHERE query LIKE 'LISTEN%%'"), "another")


async def test_no_notification_is_needed(bus: CommandBus, db: Connection) -> None:
    """As if each one were lost."""
    nothing = "_tell_waiting(p_commands uuid[], p_addresses text[]) RETURNS void LANGUAGE plpgsql AS 'BEGIN END'"
    db.execute(f"CREATE OR REPLACE FUNCTION commandbus.{nothing}".encode())
    async with running(Worker(bus, DOMAIN, registry_of(Debit=echo))):
        assert (await bus.call(DOMAIN, "Debit", 7, timeout=LONG)).data == 7


@async_only("asks the database itself")
async def test_ten_thousand_waits_are_one_statement_at_a_time(
    bus: CommandBus, db: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    receipt = await bus.send(DOMAIN, "Debit", {})
    under_way: list[int] = [0]
    most: list[int] = []
    repeat = Database.repeat

    async def watched(database: Database, call: object, *args: object) -> object:
        under_way[0] += 1
        most.append(under_way[0])
        try:
            return await repeat(database, call, *args)  # type: ignore[arg-type]
        finally:
            under_way[0] -= 1

    before = one(db, "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()")
    monkeypatch.setattr(Database, "repeat", watched)
    waits = [asyncio.create_task(bus.wait(receipt, timeout=None)) for _ in range(10_000)]
    await until(lambda: len(most) >= 20, "looks")
    sessions = one(db, "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()")
    assert complete(db, lease(db, "Debit"), 7) == "done"
    assert {reply.data for reply in await asyncio.gather(*waits)} == {7}
    assert max(most) == 1
    assert sessions <= before + 2  # the listener, and a connection of the pool


@pytest.mark.parametrize("trouble", ["PERFORM pg_sleep(20)", "RAISE SQLSTATE '53200'"], ids=["no time", "no memory"])
async def test_what_cannot_be_looked_at_together_is_looked_at_in_smaller_parts(
    bus: CommandBus, db: Connection, monkeypatch: pytest.MonkeyPatch, trouble: str
) -> None:
    """As large results cannot: those of 1,000 commands may be 1 GiB."""
    receipts = await bus.send_batch([SendRequest(DOMAIN, "Debit", n) for n in range(8)])
    for _ in receipts:
        assert complete(db, lease(db, "Debit"), 7) == "done"
    db.execute("ALTER FUNCTION commandbus.outcomes_v1 RENAME TO some_outcomes")
    db.execute(
        "CREATE FUNCTION commandbus.outcomes_v1(items text) RETURNS TABLE (domain text, command_id uuid, "
        "command_type text, status text, result text, error text, correlation_id text) LANGUAGE plpgsql AS "
        f"$$ BEGIN IF json_array_length(items::json) > 2 THEN {trouble}; END IF; "
        "RETURN QUERY SELECT * FROM commandbus.some_outcomes(items); END $$".encode()
    )
    monkeypatch.setattr(_database, "CALL_SECONDS", 0.5)
    monkeypatch.setattr(_waits, "_TOGETHER", 3600.0)  # all of them, each time
    waits = [asyncio.create_task(bus.wait(receipt, timeout=LONG)) for receipt in receipts]
    assert [(await each).data for each in waits] == [7] * 8


@async_only("asks the database itself")
async def test_what_is_heard_of_while_its_end_is_found_is_not_looked_at_again(
    bus: CommandBus, db: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when listening begins: a program that ends then would cut that look off, and the pool warns of that."""
    receipt = await bus.send(DOMAIN, "Debit", {})
    assert complete(db, lease(db, "Debit"), 7) == "done"
    looks: list[object] = []
    repeat = Database.repeat

    async def heard_meanwhile(database: Database, call: object, *args: object) -> object:
        looks.append(call)
        found: object = await repeat(database, call, *args)  # type: ignore[arg-type]
        bus._waits._hear("")
        return found

    monkeypatch.setattr(Database, "repeat", heard_meanwhile)
    assert (await bus.wait(receipt, timeout=LONG)).data == 7
    assert len(looks) == 1


@direct_only
async def test_who_calls_is_told_of_the_end(bus: CommandBus, monkeypatch: pytest.MonkeyPatch) -> None:
    """With nothing but notifications to go by: looks are an hour apart."""
    monkeypatch.setattr(_waits, "_SHORTEST", 3600.0)
    async with running(Worker(bus, DOMAIN, registry_of(Debit=echo))):
        with pytest.raises(ReplyTimeoutError):
            await bus.wait(await bus.send(DOMAIN, "Unknown", {}), timeout=timedelta(seconds=1))  # it listens
        assert [(await bus.call(DOMAIN, "Debit", n, timeout=LONG)).data for n in range(5)] == list(range(5))


@direct_only
async def test_each_call_hints_to_the_workers(
    bus: CommandBus, db: Connection, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_hints, "LIGHT", 3600.0)  # what is not awaited has one hint only
    monkeypatch.setattr(_hints, "LOADED", 3600.0)
    listener = connect(autocommit=True)
    listener.execute("LISTEN commandbus")
    calls = []
    for number in range(1, 4):
        calls.append(asyncio.create_task(bus.call(DOMAIN, "Debit", {}, timeout=LONG)))
        await until(lambda n=number: one(db, "SELECT count(*) = %s FROM commandbus.command", n), "the command")  # type: ignore[misc]
        (notice,) = await asyncio.to_thread(lambda: list(listener.notifies(timeout=10, stop_after=1)))
        assert notice.payload == DOMAIN
    for _ in calls:
        assert complete(db, lease(db, "Debit"), 7) == "done"
    assert [(await each).data for each in calls] == [7, 7, 7]


# --------------------------------------------------------------------------------------- replies to a domain


def replies(db: Connection) -> list[tuple[object, ...]]:
    return rows(db, "SELECT data, correlation_id, priority, headers FROM commandbus.commands WHERE domain = 'replies'")


@pytest.mark.parametrize("status", ["COMPLETED", "FAILED", "CANCELED"])
async def test_an_end_sends_one_reply(bus: CommandBus, db: Connection, status: str) -> None:
    receipt = await bus.send(
        DOMAIN, "Debit", {}, reply_to="replies", correlation_id="c", priority=7, headers={"trace": "t"}
    )
    if status == "CANCELED":
        await bus.cancel(receipt)
    else:
        item = lease(db, "Debit")
        done = complete(db, item, {"n": 1}) if status == "COMPLETED" else fail(db, item, "BUSINESS")
        assert done == "done"
        assert complete(db, item, {"n": 1}) in {"done", "lost"}  # a repeated call sends none
    ((data, *rest),) = replies(db)
    assert rest == ["c", 7, {"trace": "t"}]
    assert data == {
        "domain": DOMAIN,
        "command_id": str(receipt.command_id),
        "command_type": "Debit",
        "status": status,
        "result": {"n": 1} if status == "COMPLETED" else None,
        "error": {"code": "X", "message": "m"} if status == "FAILED" else None,
    }


async def test_a_parked_command_sends_its_reply_when_an_operator_ends_it(bus: CommandBus, db: Connection) -> None:
    receipt = await bus.send(DOMAIN, "Debit", {}, reply_to="replies")
    assert fail(db, lease(db, "Debit"), "PERMANENT") == "done"
    assert replies(db) == []
    await TroubleshootingQueue(bus).operator_cancel(DOMAIN, receipt.command_id, operator="ana", reason="why")
    assert [data["status"] for data, *_ in replies(db)] == ["CANCELED"]  # type: ignore[index]


async def test_a_handler_reads_the_reply(bus: CommandBus) -> None:
    read: list[Reply] = []

    async def note(command: Command, context: HandlerContext) -> None:
        read.append(Reply.of(command))

    debit, answers = registry_of(Debit=echo), registry_of("replies", Reply=note)
    async with running(Worker(bus, DOMAIN, debit)), running(Worker(bus, "replies", answers)):
        receipt = await bus.send(DOMAIN, "Debit", {"n": 1}, reply_to="replies", correlation_id="c")
        reply = await bus.wait(receipt, timeout=LONG)
        await until(lambda: read, "the reply")
    assert read == [reply]


async def test_what_is_no_reply_is_parked_by_who_reads_it(bus: CommandBus) -> None:
    async def note(command: Command, context: HandlerContext) -> None:
        Reply.of(command)

    async with running(Worker(bus, DOMAIN, registry_of(Reply=note))):
        with pytest.raises(CommandParkedError, match="NOT_A_REPLY"):
            await bus.call(DOMAIN, "Reply", {"status": "COMPLETED"}, timeout=LONG, on_parked="raise")


async def test_a_reply_may_be_larger_and_deeper_than_what_is_sent(bus: CommandBus, db: Connection) -> None:
    deep = nested(64)
    for result in ("x" * 1_000_000, deep):
        receipt = await bus.send(DOMAIN, "Debit", {}, reply_to="replies")
        assert complete(db, lease(db, "Debit"), result) == "done"
        item = lease(db, "Reply", domain="replies")
        command = await bus.get_command("replies", UUID(item["command_id"]))
        assert Reply.of(command).data == result
        assert Reply.of(command).command_id == receipt.command_id
        assert json.dumps(command.data)
