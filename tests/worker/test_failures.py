"""Handlers that do not succeed: verdicts, back-off, attempts, and errors that are hard to write down."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import Any

import pytest

from commandbus import (
    BusinessRuleError,
    Command,
    CommandBus,
    CommandStatus,
    HandlerContext,
    HandlerRegistry,
    PermanentCommandError,
    RetryPolicy,
    TransientCommandError,
    TroubleshootingQueue,
    Worker,
)
from tests.bus.support import DOMAIN
from tests.worker.support import AT_ONCE, PARKED, all_settled, echo, events, registry_of, running, settled, story


async def test_a_transient_error_is_tried_again_after_its_backoff(bus: CommandBus) -> None:
    async def twice(command: Command, context: HandlerContext) -> int:
        if context.attempt < 3:
            raise TransientCommandError("LATER", "not yet", {"attempt": context.attempt})
        return context.attempt

    registry = HandlerRegistry()
    waits = [timedelta(milliseconds=20), timedelta(milliseconds=60)]
    registry.handler(DOMAIN, "Debit", retry=RetryPolicy(4, waits, jitter=0))(twice)
    async with running(Worker(bus, DOMAIN, registry)):
        receipt = await bus.send(DOMAIN, "Debit", {})
        command = await settled(bus, receipt)
    assert (command.status, command.result, command.attempts, command.delivery) == ("COMPLETED", 3, 3, 3)
    failed = await events(bus, receipt, "ATTEMPT_FAILED")
    assert [event.attempt for event in failed] == [1, 2]
    assert [event.error.details for event in failed if event.error] == [{"attempt": 1}, {"attempt": 2}]
    claimed = (await events(bus, receipt, "CLAIMED"))[1:]
    for before, after, wait in zip(failed, claimed, waits, strict=True):
        assert after.occurred_at - before.occurred_at >= wait


@pytest.mark.parametrize(("own", "attempts"), [(None, 3), (1, 1), (5, 5)])
async def test_attempts_end_and_the_commands_own_limit_goes_first(
    bus: CommandBus, own: int | None, attempts: int
) -> None:
    async def never(command: Command, context: HandlerContext) -> None:
        raise TransientCommandError("DOWN", "still down")

    async with running(Worker(bus, DOMAIN, registry_of(Debit=never))):
        receipt = await bus.send(DOMAIN, "Debit", {}, max_attempts=own)
        command = await settled(bus, receipt)
    assert (command.status, command.attempts, command.crashes) == (PARKED, attempts, 0)
    assert command.error is not None
    assert (command.error.code, command.error.message) == ("DOWN", "still down")
    assert await story(bus, receipt) == ["SENT", *["CLAIMED", "ATTEMPT_FAILED"] * (attempts - 1), "CLAIMED", "PARKED"]


async def test_a_permanent_error_parks_and_an_operator_has_the_last_word(bus: CommandBus) -> None:
    async def picky(command: Command, context: HandlerContext) -> Any:  # noqa: ANN401 - any JSON
        if command.data < 0:
            raise PermanentCommandError("NEGATIVE", "cannot be", {"data": command.data})
        return command.data

    queue = TroubleshootingQueue(bus)
    async with running(Worker(bus, DOMAIN, registry_of(Debit=picky))):
        receipt = await bus.send(DOMAIN, "Debit", -1)
        command = await settled(bus, receipt)
        assert (command.status, command.attempts) == (PARKED, 1)
        (listed,) = await queue.list_troubleshooting(DOMAIN)
        assert listed.error == command.error
        await queue.operator_retry(DOMAIN, receipt.command_id, data=4, operator="ana")
        command = await settled(bus, receipt)
    assert (command.status, command.result, command.attempts) == (CommandStatus.COMPLETED, 4, 1)


async def test_a_business_rule_ends_it(bus: CommandBus) -> None:
    def refuse(command: Command, context: HandlerContext) -> None:
        raise BusinessRuleError("NO_MONEY", "the account is empty", [1, 2])

    async with running(Worker(bus, DOMAIN, registry_of(Debit=refuse))):
        receipt = await bus.send(DOMAIN, "Debit", {})
        command = await settled(bus, receipt)
    assert (command.status, command.attempts, command.result) == (CommandStatus.FAILED, 1, None)
    assert command.error is not None
    assert (command.error.code, command.error.details) == ("NO_MONEY", [1, 2])
    assert await story(bus, receipt) == ["SENT", "CLAIMED", "FAILED"]


class Unprintable(Exception):  # noqa: N818 - a name for a test
    """Its text cannot be had."""

    def __str__(self) -> str:
        raise RuntimeError("no text")


class UnprintableStop(StopIteration):
    """Neither can be passed on to a future."""

    def __str__(self) -> str:
        raise RuntimeError("no text")


def _deep(depth: int = 100_000) -> list[Any]:
    found: list[Any] = []
    for _ in range(depth):
        found = [found]
    return found


def _unprintable() -> object:
    class Details:
        def __repr__(self) -> str:
            raise RuntimeError("no repr")

    return Details()


ERRORS: dict[str, Any] = {
    "any exception": lambda: ValueError("broken"),
    "without text": ValueError,
    "SystemExit": lambda: SystemExit(3),
    "StopIteration": lambda: StopIteration("over"),
    "CancelledError": lambda: asyncio.CancelledError("from inside"),
    "TimeoutError": lambda: TimeoutError("of its own"),
    "a group": lambda: ExceptionGroup("several", [ValueError("1"), KeyError("2")]),
    "NUL": lambda: ValueError("a\0b"),
    "surrogates": lambda: ValueError("a\ud800b"),
    "huge": lambda: ValueError("x" * 5_000_000),
    "no text at all": Unprintable,
    "no text of StopIteration": UnprintableStop,
    "code with NUL": lambda: TransientCommandError("a\0b", "m"),
    "code no text": lambda: TransientCommandError(5, ["m"]),  # type: ignore[arg-type]
    "details with NUL": lambda: TransientCommandError("X", "m", {"a": "\0"}),
    "details with a surrogate": lambda: TransientCommandError("X", "m", {"a": "\udfff"}),
    "details huge": lambda: TransientCommandError("X", "m", ["x" * 1_000_000]),
    "details no JSON": lambda: TransientCommandError("X", "m", {1, 2}),
    "details not a number": lambda: TransientCommandError("X", "m", float("nan")),
    "details too deep": lambda: TransientCommandError("X", "m", _deep()),
    "details a huge number": lambda: TransientCommandError("X", "m", 10**5000),
    "details that cannot be shown": lambda: TransientCommandError("X", "m", _unprintable()),
}


@pytest.mark.parametrize("colour", ["async", "def"])
async def test_whatever_is_raised_is_recorded_and_counted(bus: CommandBus, colour: str) -> None:
    async def on_the_loop(command: Command, context: HandlerContext) -> None:
        if "StopIteration" in command.data:
            return in_a_thread(command, context)  # a coroutine cannot raise it: RuntimeError
        raise ERRORS[command.data]()  # noqa: RSE102 - it makes one

    def in_a_thread(command: Command, context: HandlerContext) -> None:
        raise ERRORS[command.data]()  # noqa: RSE102 - it makes one

    registry = registry_of(Debit=on_the_loop if colour == "async" else in_a_thread, Echo=echo)
    async with running(Worker(bus, DOMAIN, registry, thread_pool_size=4)):
        receipts = {name: await bus.send(DOMAIN, "Debit", name, max_attempts=2) for name in ERRORS}
        neighbours = [await bus.send(DOMAIN, "Echo", n) for n in range(10)]
        assert {c.status for c in await all_settled(bus, neighbours)} == {CommandStatus.COMPLETED}
        for name, receipt in receipts.items():
            command = await settled(bus, receipt)
            assert (command.status, command.attempts, command.crashes) == (PARKED, 2, 0), name
            assert command.delivery == 2, name
            assert command.error is not None, name
            assert command.error.code, name
            assert len(command.error.message) <= 5000, name


async def test_the_text_of_an_error_is_kept(bus: CommandBus) -> None:
    async def broken(command: Command, context: HandlerContext) -> None:
        raise ValueError("a\0b\ud800c" + "x" * 10_000)

    async with running(Worker(bus, DOMAIN, registry_of(Debit=broken))):
        command = await settled(bus, await bus.send(DOMAIN, "Debit", {}, max_attempts=1))
    assert command.error is not None
    assert command.error.code == "ValueError"
    assert command.error.message.startswith("a\N{REPLACEMENT CHARACTER}b\N{REPLACEMENT CHARACTER}cxxx")


async def test_the_policy_is_of_the_type(bus: CommandBus) -> None:
    async def never(command: Command, context: HandlerContext) -> None:
        raise ValueError("never")

    registry = HandlerRegistry()
    registry.handler(DOMAIN, "Once", retry=RetryPolicy(max_attempts=1))(never)
    registry.handler(DOMAIN, "Thrice", retry=AT_ONCE)(never)
    async with running(Worker(bus, DOMAIN, registry)):
        receipts = [await bus.send(DOMAIN, command_type, {}) for command_type in ("Once", "Thrice")]
        assert [command.attempts for command in await all_settled(bus, receipts)] == [1, 3]
