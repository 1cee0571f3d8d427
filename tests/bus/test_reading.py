"""What can be read of commands: one, pages of them, counts, and their trails."""

from __future__ import annotations

import base64
from datetime import timedelta
from typing import Any
from uuid import UUID, uuid4

import pytest

from commandbus import (
    Command,
    CommandBus,
    CommandBusError,
    CommandNotFoundError,
    CommandStatus,
    DatabaseUnavailableError,
    Error,
    InvalidCommandError,
    SendRequest,
    Stat,
    Violation,
    Waiting,
    WaitingReason,
)
from commandbus._calls import Call
from tests.bus.support import DOMAIN, Connect, Connection, bring, complete, expire, fail, lease, one, rows, terminate
from tests.support import async_only


async def all_pages(bus: CommandBus, limit: int, **filters: Any) -> list[list[Command]]:
    """Every page of a query."""
    pages = [await bus.query_commands(limit=limit, **filters)]
    while pages[-1].next_cursor is not None:
        pages.append(await bus.query_commands(limit=limit, cursor=pages[-1].next_cursor, **filters))
    return [list(page) for page in pages]


async def test_a_command_is_found_by_receipt_or_by_id(bus: CommandBus) -> None:
    receipt = await bus.send(DOMAIN, "Debit", {"a": 1})
    assert await bus.get_command(receipt) == await bus.get_command(DOMAIN, receipt.command_id)
    with pytest.raises(CommandNotFoundError, match=str(receipt.command_id)):
        await bus.get_command("shipping", receipt.command_id)
    with pytest.raises(CommandNotFoundError, match=DOMAIN):
        await bus.get_audit_trail(DOMAIN, uuid4())
    with pytest.raises(TypeError, match="receipt"):
        await bus.get_command(DOMAIN)


async def test_pages_hold_everything_once_newest_first(bus: CommandBus) -> None:
    receipts = await bus.send_batch([SendRequest(DOMAIN, "Debit", n) for n in range(25)])
    pages = await all_pages(bus, 10)
    assert [len(page) for page in pages] == [10, 10, 5]
    found = [command.command_id for page in pages for command in page]
    assert found == [receipt.command_id for receipt in reversed(receipts)]


async def test_a_full_last_page_is_the_last(bus: CommandBus) -> None:
    await bus.send_batch([SendRequest(DOMAIN, "Debit", n) for n in range(20)])
    assert [len(page) for page in await all_pages(bus, 10)] == [10, 10]


async def test_pages_hold_what_is_finished_and_every_domain(bus: CommandBus, db: Connection) -> None:
    await bus.send(DOMAIN, "Done", {})
    bring(db, "Done", "COMPLETED")
    await bus.send_batch([SendRequest(domain, "Debit", {}) for domain in (DOMAIN, "shipping") * 3])
    found = [command for page in await all_pages(bus, 2) for command in page]
    assert len(found) == len({command.command_id for command in found}) == 7
    assert [command.domain for command in found] == ["shipping"] * 3 + [DOMAIN] * 4


async def test_since_leaves_out_what_is_older(bus: CommandBus, db: Connection) -> None:
    old, young = [await bus.send(DOMAIN, "Debit", n) for n in range(2)]
    db.execute("UPDATE commandbus.command SET sent_at = sent_at - interval '2 h' WHERE data = '0'")
    page = await bus.query_commands(since=timedelta(hours=1))
    assert [command.command_id for command in page] == [young.command_id]
    pages = await all_pages(bus, 1, since=timedelta(hours=3))
    assert [command.command_id for page in pages for command in page] == [young.command_id, old.command_id]


async def test_why_a_command_waits(bus: CommandBus, db: Connection) -> None:
    receipt = await bus.send(DOMAIN, "Debit", {}, delay=timedelta(hours=1))
    due = (await bus.get_command(receipt)).due_at
    assert await bus.explain(receipt) == Waiting(WaitingReason.DELAY, due, None, None, 0)
    assert await bus.explain(DOMAIN, receipt.command_id) == await bus.explain(receipt)
    await bus.cancel(receipt)
    assert await bus.explain(receipt) is None
    with pytest.raises(CommandNotFoundError, match=str(receipt.command_id)):
        await bus.explain("shipping", receipt.command_id)


async def test_filters_narrow_it(bus: CommandBus, db: Connection) -> None:
    for domain, command_type in ((DOMAIN, "Debit"), (DOMAIN, "Credit"), (DOMAIN, "Parked"), ("shipping", "Debit")):
        await bus.send(domain, command_type, {})
    bring(db, "Parked", "IN_TROUBLESHOOTING_QUEUE")

    async def found(**filters: Any) -> set[tuple[str, str]]:
        page = await bus.query_commands(**filters)
        assert await bus.count(**filters) == len(page)
        return {(command.domain, command.command_type) for command in page}

    assert len(await found()) == 4
    assert await found(domain="shipping") == {("shipping", "Debit")}
    assert await found(command_type="Debit") == {(DOMAIN, "Debit"), ("shipping", "Debit")}
    assert await found(status=CommandStatus.IN_TROUBLESHOOTING_QUEUE) == {(DOMAIN, "Parked")}
    assert await found(domain=DOMAIN, command_type="Credit") == {(DOMAIN, "Credit")}
    assert await found(domain="shipping", command_type="Credit") == set()


async def test_a_page_is_1_to_1000(bus: CommandBus) -> None:
    for limit in (0, -1, 1001):
        with pytest.raises(InvalidCommandError, match="limit"):
            await bus.query_commands(limit=limit)
    for limit in (1, 1000):
        assert len(await bus.query_commands(limit=limit)) == 0


def _encoded(text: str) -> str:
    return base64.urlsafe_b64encode(text.encode()).decode()


BAD_CURSORS = {
    "text": "nonsense",
    "empty": "",
    "not ASCII": "ä",
    "a number": _encoded("5"),
    "too short": _encoded('["d"]'),
    "no id": _encoded('["d", "x"]'),
    "a number as id": _encoded('["d", 5]'),
    "null as id": _encoded('["d", null]'),
    "deep": _encoded("[" * 100_000),
}


@pytest.mark.parametrize("text", ["a\0b", "a\ud800b"], ids=ascii)
async def test_words_that_postgresql_cannot_take_are_refused_by_type(bus: CommandBus, text: str) -> None:
    for ask in (
        lambda: bus.count(domain=text),
        lambda: bus.query_commands(command_type=text),
        lambda: bus.get_command(text, UUID(int=7)),
        lambda: bus.cancel(text, UUID(int=7)),
    ):
        with pytest.raises(InvalidCommandError, match="correct the text"):
            await ask()


async def test_since_has_bounds(bus: CommandBus) -> None:
    for since in (timedelta.max, timedelta(seconds=-1), 5):
        with pytest.raises(InvalidCommandError, match=r"since is .*: it must be a timedelta of 0 to 3650 days"):
            await bus.query_commands(since=since)  # type: ignore[arg-type]


async def test_a_cursor_is_one_that_a_page_gave(bus: CommandBus) -> None:
    for name, cursor in BAD_CURSORS.items():
        try:
            await bus.query_commands(cursor=cursor)
        except InvalidCommandError as error:
            assert "cursor" in str(error), name  # noqa: PT017 - in a loop
        else:
            pytest.fail(f"{name}: it was taken")


async def test_stats_tell_what_is_unfinished(bus: CommandBus, db: Connection) -> None:
    first = await bus.get_command(await bus.send(DOMAIN, "Debit", 1))
    await bus.send(DOMAIN, "Debit", 2)
    late = await bus.get_command(await bus.send(DOMAIN, "Later", 1, delay=timedelta(hours=1)))
    away = await bus.get_command(await bus.send("shipping", "Debit", 1))
    await bus.send(DOMAIN, "Done", 1)
    bring(db, "Done", "COMPLETED")
    here = [
        Stat(DOMAIN, "Debit", CommandStatus.PENDING, 2, first.sent_at),
        Stat(DOMAIN, "Later", CommandStatus.SCHEDULED, 1, late.sent_at),
    ]
    assert await bus.stats(domain=DOMAIN) == here
    assert await bus.stats() == [*here, Stat("shipping", "Debit", CommandStatus.PENDING, 1, away.sent_at)]


async def test_the_trail_tells_every_step(bus: CommandBus, db: Connection) -> None:
    receipt = await bus.send(DOMAIN, "Debit", {})
    command_id = str(receipt.command_id)
    failed = lease(db, "Debit")
    fail(db, failed, "PERMANENT")
    db.execute("SELECT commandbus.operator_retry_v1(%s, %s, 'ana', 'why', '7')", [DOMAIN, command_id])
    crashed = lease(db, "Debit")
    expire(db, command_id)
    done = lease(db, "Debit")
    complete(db, done, {"r": 1})

    events = await bus.get_audit_trail(receipt)
    assert [(e.event, e.from_status, e.to_status) for e in events] == [
        ("SENT", None, "PENDING"),
        ("CLAIMED", "PENDING", "IN_PROGRESS"),
        ("PARKED", "IN_PROGRESS", "IN_TROUBLESHOOTING_QUEUE"),
        ("OPERATOR_RETRIED", "IN_TROUBLESHOOTING_QUEUE", "PENDING"),
        ("CLAIMED", "PENDING", "IN_PROGRESS"),
        ("CRASHED", "IN_PROGRESS", "PENDING"),
        ("CLAIMED", "PENDING", "IN_PROGRESS"),
        ("COMPLETED", "IN_PROGRESS", "COMPLETED"),
    ]
    tokens = [item["lease_token"] for item in (failed, crashed, done) for _ in range(2)]
    assert [str(e.lease_token) for e in events if e.worker == "thief"] == tokens
    assert [e.delivery for e in events if e.worker == "thief"] == [1, 1, 2, 2, 3, 3]
    assert events[2].error == Error("X", "m")
    assert (events[3].operator, events[3].reason) == ("ana", "why")
    assert events[3].details == {"old_data": {}, "new_data": 7}
    assert [e.step for e in events] == sorted({e.step for e in events})
    assert [e.occurred_at for e in events] == sorted(e.occurred_at for e in events)


async def test_what_python_cannot_read_does_not_stop_a_reader(bus: CommandBus, db: Connection) -> None:
    large = '[{"domain":"payments","command_type":"Debit","data":1e5000}]'
    ((command_id,),) = rows(db, "SELECT command_id FROM commandbus.send_v1(%s)", large)
    await bus.send(DOMAIN, "Debit", 1)
    assert "cannot be read" in (await bus.get_command(DOMAIN, command_id)).data
    assert len(await bus.query_commands()) == 2


async def test_reading_outlives_its_connections(bus: CommandBus, db: Connection) -> None:
    receipt = await bus.send(DOMAIN, "Debit", 1)
    for _ in range(3):
        killed = rows(
            db,
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE datname = current_database() AND pid <> pg_backend_pid() AND backend_type = 'client backend'",
        )
        assert killed
        assert (await bus.get_command(receipt)).data == 1


@pytest.mark.corrupts
async def test_verify_names_what_cannot_be(bus: CommandBus, db: Connection) -> None:
    first, second = [await bus.send(DOMAIN, "Debit", {}) for _ in range(2)]
    assert await bus.verify() == []
    db.execute("UPDATE commandbus.command SET crashes = 1 WHERE command_id = %s", [second.command_id])
    db.execute("UPDATE commandbus.command SET attempts = 2 WHERE command_id = %s", [first.command_id])
    assert await bus.verify() == [
        Violation("wrong_attempts", DOMAIN, first.command_id, "its attempts are 2, expected 0"),
        Violation("wrong_crashes", DOMAIN, second.command_id, "its crashes are 1, expected 0"),
    ]


async def test_verify_has_a_deadline_of_its_own(bus: CommandBus, connect: Connect) -> None:
    blocker = connect()
    blocker.execute("LOCK TABLE commandbus.command_history")
    with pytest.raises(CommandBusError, match=r"took longer than 0\.05 s") as caught:
        await bus.verify(timeout=timedelta(milliseconds=50))
    assert not isinstance(caught.value, DatabaseUnavailableError)
    blocker.rollback()
    assert await bus.verify() == []


@pytest.mark.parametrize("verb", ["get_command", "get_audit_trail", "explain", "cancel"])
async def test_an_id_is_a_uuid(bus: CommandBus, verb: str) -> None:
    with pytest.raises(InvalidCommandError, match=r"command_id is 'zzz': it must be a uuid\.UUID"):
        await getattr(bus, verb)(DOMAIN, "zzz")


async def test_a_status_that_does_not_exist_is_refused(bus: CommandBus) -> None:
    wrong: Any = "pending"
    with pytest.raises(InvalidCommandError, match="status is 'pending': it must be one of PENDING, SCHEDULED"):
        await bus.query_commands(status=wrong)
    with pytest.raises(InvalidCommandError, match="status is 'pending'"):
        await bus.count(status=wrong)


@async_only("runs a call of its own on the pool")
async def test_what_is_too_slow_is_not_begun_again(bus: CommandBus, connect: Connect) -> None:
    """What was severed goes on in the server: six of a slow query are worse than one."""
    slow = Call("SELECT pg_sleep(3600) -- too slow", (), len)
    with pytest.raises(DatabaseUnavailableError, match=r"did not answer within 0\.05 s"):
        await bus.database.repeat(slow, 0.05)
    assert len(terminate(connect(autocommit=True), "-- too slow")) == 1


@async_only("runs a call of its own on the pool")
async def test_what_may_take_long_is_stopped_in_the_server(bus: CommandBus, connect: Connect) -> None:
    slow = Call("SELECT pg_sleep(3600) -- may take long", (), len)
    with pytest.raises(CommandBusError, match="Nothing was written"):
        await bus.database.repeat(slow, 0.05, long=True)
    running = "SELECT count(*) FROM pg_stat_activity WHERE state = 'active' AND query LIKE '%%pg_sleep(3600)%%'"
    assert one(connect(), f"{running} AND pid <> pg_backend_pid()") == 0
