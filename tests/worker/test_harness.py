"""The kit for users' tests: it runs what is due, moves the clock of everybody, and shows what was sent."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import pytest
from psycopg.conninfo import make_conninfo

from commandbus import (
    Command,
    CommandBus,
    CommandStatus,
    ConfigurationError,
    HandlerContext,
    HandlerRegistry,
    PermanentCommandError,
    RetryPolicy,
    SendRequest,
    TransientCommandError,
)
from commandbus.testing import Harness, SyncHarness, open_clock
from tests.bus.support import DOMAIN, Connection, one
from tests.worker.support import HOUR, PARKED, echo, registry_of

COMPLETED, SCHEDULED = CommandStatus.COMPLETED, CommandStatus.SCHEDULED


@pytest.fixture(autouse=True)
def _test_clock(dsn: str) -> None:
    open_clock(dsn)


def types(commands: list[Command]) -> list[str]:
    return [command.command_type for command in commands]


async def test_it_runs_what_is_due_and_what_that_sends(bus: CommandBus) -> None:
    registry = HandlerRegistry()

    @registry.handler(DOMAIN, "Debit", transactional=True)
    async def debit(command: Command, context: HandlerContext) -> None:
        await context.bus.send("mail", "Confirm", {}, connection=context.connection)

    @registry.handler("mail", "Confirm")
    async def confirm(command: Command, context: HandlerContext) -> None:
        await context.bus.send("mail", "Archive", {})

    registry.handler("mail", "Archive")(echo)
    await bus.send(DOMAIN, "Debit", {})
    ran = await Harness(bus, registry).run_until_idle()
    assert [(each.command_type, each.status) for each in ran.commands] == [
        ("Debit", COMPLETED),
        ("Confirm", COMPLETED),
        ("Archive", COMPLETED),
    ]
    assert ran.unhandled == []


async def test_each_run_tells_its_own(bus: CommandBus) -> None:
    harness = Harness(bus, registry_of(Debit=echo))
    for number in range(3):
        receipt = await bus.send(DOMAIN, "Debit", number)
        ran = await harness.run_until_idle()
        assert [(each.command_id, each.result) for each in ran.commands] == [(receipt.command_id, number)]
    assert (await harness.run_until_idle()).commands == []


async def test_what_has_no_handler_is_left_and_named(bus: CommandBus) -> None:
    for domain, command_type in [(DOMAIN, "Debit"), (DOMAIN, "Odd"), ("mail", "Debit")]:
        await bus.send(domain, command_type, {})
    assert types((await Harness(bus).run_until_idle()).unhandled) == ["Debit", "Odd", "Debit"]
    ran = await Harness(bus, registry_of(Debit=echo)).run_until_idle()
    assert types(ran.commands) == ["Debit"]
    assert [(each.domain, each.command_type, each.status) for each in ran.unhandled] == [
        (DOMAIN, "Odd", CommandStatus.PENDING),
        ("mail", "Debit", CommandStatus.PENDING),
    ]


async def test_a_domain_limits_what_is_run_and_named(bus: CommandBus) -> None:
    registry = registry_of(Debit=echo)
    registry.handler("mail", "Confirm")(echo)
    for domain, command_type in [(DOMAIN, "Debit"), (DOMAIN, "Odd"), ("mail", "Confirm"), ("mail", "Odd")]:
        await bus.send(domain, command_type, {})
    ran = await Harness(bus, registry).run_until_idle("mail")
    assert [[each.domain for each in found] for found in (ran.commands, ran.unhandled)] == [["mail"], ["mail"]]
    assert types((await Harness(bus, registry).run_until_idle([DOMAIN])).commands) == ["Debit"]


async def test_what_is_parked_is_left(bus: CommandBus) -> None:
    async def refuse(command: Command, context: HandlerContext) -> None:
        raise PermanentCommandError("NO_SUCH_ACCOUNT", "closed")

    await bus.send(DOMAIN, "Debit", {})
    (command,) = (await Harness(bus, registry_of(Debit=refuse)).run_until_idle()).commands
    assert command.status == PARKED


async def test_back_off_and_delay_pass_as_the_clock_moves(bus: CommandBus) -> None:
    async def debit(command: Command, context: HandlerContext) -> int:
        if context.attempt < 3:
            raise TransientCommandError("BANK_CLOSED", "try later")
        return context.attempt

    harness = Harness(bus, registry_of(Debit=debit, Remind=echo, retry=RetryPolicy(backoff=[HOUR, 9 * HOUR], jitter=0)))
    await bus.send(DOMAIN, "Debit", {})
    await bus.send(DOMAIN, "Remind", {}, delay=timedelta(days=365))
    seen = []
    for hours in (0, 1, 8, 1, 24 * 365):
        await harness.advance(hours * HOUR)
        seen.append([(each.command_type, each.status) for each in (await harness.run_until_idle()).commands])
    waits, done = ("Debit", SCHEDULED), ("Debit", COMPLETED)
    assert seen == [[waits], [waits], [], [done], [("Remind", COMPLETED)]]


async def test_a_command_of_a_dead_worker_is_named_and_run_when_its_lease_is_over(
    bus: CommandBus, db: Connection
) -> None:
    receipt = await bus.send(DOMAIN, "Debit", {})
    db.execute("SELECT commandbus.claim_v1(%s, '[[\"Debit\", -1, 3621246147207446528]]', 1, 'dead', 60)", [DOMAIN])
    harness = Harness(bus, registry_of(Debit=echo))
    with pytest.raises(TimeoutError, match=f"Debit {receipt.command_id} is IN_PROGRESS"):
        await harness.run_until_idle(timeout=timedelta(0))
    await harness.advance(timedelta(seconds=61))
    (command,) = (await harness.run_until_idle()).commands
    assert (command.delivery, command.crashes, command.status) == (2, 1, COMPLETED)


async def test_a_run_without_end_is_ended_and_its_commands_are_released(bus: CommandBus) -> None:
    started = []

    async def hang(command: Command, context: HandlerContext) -> None:
        started.append(command.command_id)
        await asyncio.Event().wait()

    receipts = await bus.send_batch([SendRequest(DOMAIN, "Debit", {})] * 12)
    harness = Harness(bus, registry_of(Debit=hang))
    while not started:
        with pytest.raises(TimeoutError, match=r"12 commands are still due(.|\n)*and 2 more$") as caught:
            await harness.run_until_idle(timeout=timedelta(milliseconds=200))
        assert sum(str(receipt.command_id) in str(caught.value) for receipt in receipts) == 10
    assert await bus.count(status=CommandStatus.PENDING) == 12


async def test_the_clock_of_sessions_of_others_moves_as_well(bus: CommandBus, db: Connection) -> None:
    clock = "SELECT extract(epoch FROM commandbus.clock() - clock_timestamp())::float8"
    harness = Harness(bus)
    ahead = []
    for by in (0 * HOUR, HOUR, timedelta(days=2, microseconds=1)):
        await harness.advance(by)
        ahead.append(round(one(db, clock)))
    assert ahead == [0, 3600, 3600 + 2 * 86400]


async def test_without_a_test_clock_nothing_moves(bus: CommandBus, db: Connection) -> None:
    db.execute("UPDATE commandbus.setting SET value = 'off' WHERE name = 'test_clock'")
    with pytest.raises(ConfigurationError, match="has no test clock: take one of the fixture commandbus_dsn"):
        await Harness(bus).advance(HOUR)
    await bus.send(DOMAIN, "Debit", {})  # which goes by the clock


async def test_the_clock_does_not_go_back(bus: CommandBus) -> None:
    with pytest.raises(ConfigurationError, match="cannot go back"):
        await Harness(bus).advance(-HOUR)


@pytest.mark.parametrize("owner", [True, False], ids=["owner", "user"])
async def test_who_may_not_move_the_clock_is_told_who_may(dsn: str, db: Connection, *, owner: bool) -> None:
    with db.transaction():
        db.execute("CREATE ROLE commandbus_tester")
        db.execute("GRANT USAGE, CREATE ON SCHEMA commandbus TO commandbus_tester")
        db.execute("GRANT SELECT ON ALL TABLES IN SCHEMA commandbus TO commandbus_tester")
        if owner:
            db.execute("ALTER FUNCTION commandbus.clock() OWNER TO commandbus_tester")
    try:
        async with Harness(make_conninfo(dsn, options="-c role=commandbus_tester")) as harness:
            with pytest.raises(ConfigurationError, match="only a superuser can move the clock"):
                await harness.advance(HOUR)
    finally:
        db.execute("REASSIGN OWNED BY commandbus_tester TO postgres")
        db.execute("DROP OWNED BY commandbus_tester")
        db.execute("DROP ROLE commandbus_tester")


async def test_what_was_sent_is_shown_in_order(bus: CommandBus) -> None:
    harness = Harness(bus, registry_of(Debit=echo))
    for domain, command_type in [(DOMAIN, "Debit"), ("mail", "Confirm"), (DOMAIN, "Refund")]:
        await bus.send(domain, command_type, {})
    await harness.run_until_idle()
    assert types(await harness.sent()) == ["Debit", "Confirm", "Refund"]
    assert types(await harness.sent(DOMAIN)) == ["Debit", "Refund"]
    assert types(await harness.sent(command_type="Confirm")) == ["Confirm"]
    assert types(await harness.sent("mail", "Debit")) == []


@pytest.mark.parametrize("data", [None, {"amount": 2}, {"to": [1]}, {"amount": 2, "to": [1]}], ids=repr)
async def test_a_part_of_the_data_is_enough(bus: CommandBus, data: Any) -> None:  # noqa: ANN401 - any JSON
    await bus.send(DOMAIN, "Refund", {"amount": 2})
    first, _ = [await bus.send(DOMAIN, "Debit", {"amount": 2, "to": [1]}) for _ in range(2)]
    assert (await Harness(bus).assert_sent(DOMAIN, "Debit", data)).command_id == first.command_id


@pytest.mark.parametrize("data", [{"amount": 3}, {"amount": 2, "from": None}, [2], 0], ids=repr)
async def test_what_was_sent_instead_is_shown(bus: CommandBus, data: Any) -> None:  # noqa: ANN401 - any JSON
    await bus.send(DOMAIN, "Debit", {"amount": 2})
    await bus.send(DOMAIN, "Refund", data)
    with pytest.raises(AssertionError, match=r'no Debit with .* was sent to "payments", but\n  Debit {"amount": 2}\n'):
        await Harness(bus).assert_sent(DOMAIN, "Debit", data)
    with pytest.raises(AssertionError, match='no Debit was sent to "mail", but nothing at all'):
        await Harness(bus).assert_sent("mail", "Debit")


async def test_options_go_to_the_worker(bus: CommandBus) -> None:
    entered = []

    @contextmanager
    def middleware(command: Command, context: object) -> Iterator[None]:
        entered.append(command.command_type)
        yield

    def debit(command: Command, context: object) -> None:
        assert entered == ["Debit"]

    await bus.send(DOMAIN, "Debit", {})
    (command,) = (await Harness(bus, registry_of(Debit=debit), middleware=[middleware]).run_until_idle()).commands
    assert command.status == COMPLETED


def test_a_blocking_one_has_a_bus_of_its_own_and_gives_it_to_handlers(dsn: str) -> None:
    registry = registry_of(Confirm=echo)

    @registry.handler(DOMAIN, "Debit", transactional=True)
    def debit(command: Command, context: Any) -> None:  # noqa: ANN401 - either context
        context.bus.send(DOMAIN, "Confirm", {}, connection=context.connection)

    with SyncHarness(dsn, registry) as harness:
        harness.bus.send(DOMAIN, "Debit", {})
        assert types(harness.run_until_idle().commands) == ["Debit", "Confirm"]
