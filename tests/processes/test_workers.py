"""Processes with workers, in both halves: from the start to each end, with an operator and with time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any
from uuid import uuid4

import psycopg
import pytest
from psycopg.sql import SQL, Identifier

from commandbus import (
    CommandBus,
    CommandIdConflictError,
    CommandNotFoundError,
    CommandStateError,
    CommandStatus,
    DatabaseUnavailableError,
    Finish,
    HandlerRegistry,
    InvalidCommandError,
    OutcomeUnknownError,
    Process,
    Processes,
    ProcessRecord,
    ProcessStatus,
    Reply,
    Send,
    TroubleshootingQueue,
    Wait,
    Worker,
    _database,
)
from tests.processes.support import load_example
from tests.support import Route, aeventually, direct_only
from tests.worker.support import running

example = load_example()
WHO = {"operator": "ann", "reason": "looked at it"}


@dataclass
class Trial:
    """The state of the processes below."""

    names: list[str] = field(default_factory=list)


class Patient(Process[Trial], domain="trials"):
    """Waits for a day, unless somebody ends that."""

    def start(self, state: Trial) -> Wait:
        return Wait(timedelta(days=1), "rest")

    def on_rest(self, state: Trial, reply: Reply) -> Finish:
        state.names.append("rested")
        return Finish("well")


@asynccontextmanager
async def work(route: Route, registry: HandlerRegistry) -> AsyncIterator[tuple[CommandBus, Processes]]:
    """A bus, with a worker for all domains of a registry."""
    async with CommandBus(**route) as bus, running(Worker(bus, registry.domains, registry)):
        yield bus, Processes(bus)


async def ended(processes: Processes, process: Any) -> ProcessRecord:  # noqa: ANN401 - a receipt
    async def look() -> ProcessRecord | None:
        found = await processes.get_process(process.domain, process.process_id)
        return found if found.status.terminal or found.parked else None

    found = await aeventually(look, timeout=30, what="the end of the process")
    assert found is not None
    return found


@pytest.fixture
def shop(db: psycopg.Connection) -> psycopg.Connection:
    db.execute(example.SCHEMA.encode())
    return db


def done(shop: psycopg.Connection) -> list[str]:
    """What the handlers have done, in order."""
    return [row[0] for row in shop.execute("SELECT what FROM public.done ORDER BY at")]


async def test_a_fulfilment_from_start_to_end(route: Route, shop: psycopg.Connection) -> None:
    async with work(route, example.registry) as (_, processes):
        process = await processes.start_process(example.Fulfilment, example.Order("7", "teapot", "4242"))
        found = await ended(processes, process)
        steps = await processes.get_timeline(process.domain, process.process_id)
    assert (found.status, found.result) == ("COMPLETED", {"parcel": "P-7", "confirmed": True})
    assert found.state["charged"] is True
    assert sorted(done(shop)) == ["Charge", "Confirm", "Reserve", "Ship"]
    assert [(step.kind, step.name, step.status) for step in steps] == [
        ("step", "reserve", "COMPLETED"),
        ("deadline", "Fulfilment", "CANCELED"),
        ("step", "charge", "COMPLETED"),
        ("step", "confirm", "COMPLETED"),
        ("step", "ship", "COMPLETED"),
        ("deadline", "ship", "CANCELED"),
    ]
    assert {step.command_status for step in steps} == {"COMPLETED", "CANCELED"}


async def test_what_is_refused_is_undone_in_reverse(route: Route, shop: psycopg.Connection) -> None:
    async with work(route, example.registry) as (_, processes):
        process = await processes.start_process(example.Fulfilment, example.Order("7", "teapot", "declined"))
        found = await ended(processes, process)
    assert (found.status, found.error and found.error.code) == ("COMPENSATED", "DECLINED")
    assert shop.execute("SELECT available FROM public.stock WHERE item = 'teapot'").fetchone() == (5,)
    assert [what for what in done(shop) if what not in ("Confirm", "Apologize")] == ["Reserve", "Release"]


async def test_a_parked_step_shows_on_the_process_which_goes_on_when_it_is_put_right(
    route: Route, shop: psycopg.Connection
) -> None:
    async with work(route, example.registry) as (bus, processes):
        process = await processes.start_process(example.Fulfilment, example.Order("7", "teapot", "42?2"))
        found = await ended(processes, process)
        assert (found.status, found.parked, found.open[0]) == ("RUNNING", 1, "charge")
        (step,) = [s for s in await processes.get_timeline("orders", process.process_id) if s.parked_at]
        assert (step.name, step.error and step.error.code) == ("charge", "UNREADABLE")
        await TroubleshootingQueue(bus).operator_retry(
            "cards", step.command_id, data={"order_id": "7", "card": "4242"}, operator="ann"
        )
        found = await aeventually(lambda: _terminal(processes, process), timeout=30, what="the end of the process")
    assert found.status == ProcessStatus.COMPLETED


async def _terminal(processes: Processes, process: Any) -> Any:  # noqa: ANN401 - a receipt, a record
    found = await processes.get_process(process.domain, process.process_id)
    return found if found.status.terminal else None


async def test_an_operator_cancels_a_process(route: Route, shop: psycopg.Connection) -> None:
    async with work(route, example.registry) as (_, processes):
        process = await processes.start_process(example.Fulfilment, example.Order("7", "teapot", "42?2"))
        await ended(processes, process)
        await processes.cancel_process("orders", process.process_id, **WHO)
        found = await aeventually(lambda: _terminal(processes, process), timeout=30, what="the end")
        with pytest.raises(CommandStateError, match="COMPENSATED"):
            await processes.cancel_process("orders", process.process_id, **WHO)
    assert (found.status, found.error.code, found.error.message) == ("COMPENSATED", "CANCELED", "looked at it")
    assert done(shop)[-1] == "Release"


async def test_an_operator_ends_a_wait(route: Route) -> None:
    registry = HandlerRegistry()
    registry.register_process(Patient)
    async with work(route, registry) as (_, processes):
        process = await processes.start_process(Patient, Trial())
        assert (await processes.get_process("trials", process.process_id)).open == ("rest",)
        assert await processes.resume_process("trials", process.process_id, operator="ann") == ("rest",)
        found = await ended(processes, process)
    assert (found.status, found.result, found.state) == ("COMPLETED", "well", {"names": ["rested"]})


async def test_a_class_with_a_bug_loses_nothing(route: Route) -> None:
    """The reply is parked; with the right class in place, the operator lets the process go on."""

    class Buggy(Process[Trial], domain="trials"):
        right = False

        def start(self, state: Trial) -> Send:
            return Send("trials", "Try")

        def on_try(self, state: Trial, reply: Reply) -> Finish | None:
            return Finish(reply.data) if self.right else None

    registry = HandlerRegistry()
    registry.register_process(Buggy)
    registry.handler("trials", "Try")(lambda command, context: "tried")
    async with work(route, registry) as (bus, processes):
        process = await processes.start_process(Buggy, Trial())

        async def parked() -> bool:
            return bool(
                await bus.count(domain="trials", command_type="Reply", status=CommandStatus.IN_TROUBLESHOOTING_QUEUE)
            )

        await aeventually(parked, timeout=30, what="the parked reply")
        Buggy.right = True
        assert await processes.retry_process("trials", process.process_id, operator="ann") == 1
        assert (await ended(processes, process)).result == "tried"


async def test_a_start_is_idempotent_by_its_id(route: Route) -> None:
    async with CommandBus(**route) as bus:
        processes, new = Processes(bus), uuid4()
        first = await processes.start_process(Patient, Trial(), process_id=new)
        again = await processes.start_process(Patient, Trial(), process_id=new)
        assert (first.duplicate, again.duplicate, again.process_id) == (False, True, new)
        with pytest.raises(CommandIdConflictError):
            await processes.start_process(Patient, Trial(["other"]), process_id=new)
        assert await bus.count() == 1


@direct_only
async def test_a_start_that_was_not_possible_is_told_as_that(route: Route, db: psycopg.Connection) -> None:
    own = SQL("ALTER DATABASE {} SET default_transaction_read_only = {}")
    name = Identifier(db.info.dbname)
    db.execute(own.format(name, SQL("on")))
    async with CommandBus(**route) as bus:
        with pytest.raises(DatabaseUnavailableError, match=r"nothing was done: .*read-only"):
            await Processes(bus).start_process(Patient, Trial())
    db.execute(own.format(name, SQL("off")))


async def test_a_start_that_was_not_answered_is_told_with_its_id(
    route: Route, db: psycopg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    new = uuid4()
    async with CommandBus(**route) as bus:
        processes = Processes(bus)
        with db.transaction(), monkeypatch.context() as patch:
            db.execute("LOCK commandbus.process")
            patch.setattr(_database, "CALL_SECONDS", 1.0)  # not 10
            with pytest.raises(OutcomeUnknownError, match=str(new)) as unknown:
                await processes.start_process(Patient, Trial(), process_id=new)
        assert unknown.value.command_id == new
        assert (await processes.start_process(Patient, Trial(), process_id=new)).process_id == new


async def test_a_start_may_join_the_callers_transaction(route: Route, db: psycopg.Connection, dsn: str) -> None:
    async with CommandBus(**route) as bus:
        processes = Processes(bus)
        with psycopg.connect(dsn) as own:
            process = await processes.start_process(Patient, Trial(), connection=own)
            with pytest.raises(CommandNotFoundError):
                await processes.get_process("trials", process.process_id)
            own.rollback()
            process = await processes.start_process(Patient, Trial(), connection=own)
        assert (await processes.get_process("trials", process.process_id)).status == "RUNNING"
        assert await bus.count() == 1


async def test_pages_of_processes(route: Route) -> None:
    async with CommandBus(**route) as bus:
        processes = Processes(bus)
        started = [(await processes.start_process(Patient, Trial())).process_id for _ in range(3)]
        first = await processes.query_processes(domain="trials", status=ProcessStatus.RUNNING, limit=2)
        second = await processes.query_processes(domain="trials", limit=2, cursor=first.next_cursor)
        assert [p.process_id for p in (*first, *second)] == started[::-1]
        assert second.next_cursor is None
        assert not (await processes.query_processes(process_type="Other")).items


async def test_a_status_may_be_a_string_and_no_other(route: Route) -> None:
    async with CommandBus(**route) as bus:
        processes = Processes(bus)
        await processes.start_process(Patient, Trial())
        running: Any = "RUNNING"
        assert len((await processes.query_processes(status=running)).items) == 1
        wrong: Any = "PENDING"
        with pytest.raises(InvalidCommandError, match="'PENDING': it must be one of RUNNING, COMPENSATING"):
            await processes.query_processes(status=wrong)


async def test_many_at_once(route: Route, shop: psycopg.Connection) -> None:
    """Their replies come at the same time, and two to each process."""
    async with work(route, example.registry) as (_, processes):
        shop.execute("UPDATE public.stock SET available = 100")
        orders = [example.Order(str(n), "teapot", "declined" if n % 3 == 0 else "4242") for n in range(30)]
        started = await asyncio.gather(*(processes.start_process(example.Fulfilment, order) for order in orders))
        found = [await ended(processes, process) for process in started]
    assert [p.status for p in found] == ["COMPENSATED" if n % 3 == 0 else "COMPLETED" for n in range(30)]
    assert shop.execute("SELECT available FROM public.stock WHERE item = 'teapot'").fetchone() == (80,)
    twice = "SELECT order_id, what FROM public.done GROUP BY 1, 2 HAVING count(*) > 1"
    assert shop.execute(twice).fetchall() == []


def test_the_program_of_the_example_runs(
    dsn: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COMMAND_BUS_DSN", dsn)
    asyncio.run(example.main())
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("order")]
    assert told[0] == "order 1: COMPLETED {'parcel': 'P-1', 'confirmed': True}"
    assert told[1].startswith("order 2: charge")
    assert told[2].startswith("order 2: COMPLETED")
    assert told[3].startswith("order 3: COMPENSATED Error(code='SOLD_OUT'")
