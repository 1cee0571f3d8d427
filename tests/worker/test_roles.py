"""The library on a database with roles: each login does its part, and is told what it lacks for another's."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from uuid import uuid4

import psycopg
import pytest
from psycopg.conninfo import make_conninfo
from psycopg.sql import SQL, Identifier

from commandbus import (
    Command,
    CommandBus,
    CommandStatus,
    HandlerContext,
    PermanentCommandError,
    PermissionDeniedError,
    Receipt,
    SendRequest,
    TroubleshootingQueue,
    Worker,
)
from commandbus.migrate import migrate
from tests.bus.support import DOMAIN, Connect, until
from tests.support import async_only
from tests.worker.support import echo, registry_of, running, settled

Login = Callable[..., str]
KINDS = ("sender", "worker", "operator", "reader")


@pytest.fixture
def login(dsn: str, db: psycopg.Connection) -> Iterator[Login]:
    """The DSN of a new login with these roles: `login("sender", "reader")`."""
    migrate(dsn, roles=True)
    names = []

    def login(*kinds: str) -> str:
        name = f"login_{uuid4().hex}"
        names.append(name)
        db.execute(SQL("CREATE ROLE {} LOGIN").format(Identifier(name)))
        for kind in kinds:
            db.execute(SQL("GRANT {} TO {}").format(Identifier(f"commandbus_{kind}"), Identifier(name)))
        return make_conninfo(dsn, user=name)

    yield login
    for name in names:
        db.execute(SQL("DROP ROLE {}").format(Identifier(name)))


async def test_four_logins_work_together(login: Login) -> None:
    async def refuse_negative(command: Command, context: HandlerContext) -> object:
        if command.data < 0:
            raise PermanentCommandError("NEGATIVE")
        return command.data

    async with AsyncExitStack() as stack:
        sender, bus, operator, reader = [await stack.enter_async_context(CommandBus(login(kind))) for kind in KINDS]
        async with running(Worker(bus, DOMAIN, registry_of(Debit=refuse_negative))):
            good, bad = await sender.send(DOMAIN, "Debit", 1), await sender.send(DOMAIN, "Debit", -2)
            assert (await settled(reader, good)).result == 1
            assert (await settled(reader, bad)).status == CommandStatus.IN_TROUBLESHOOTING_QUEUE
            queue = TroubleshootingQueue(operator)
            (parked,) = await queue.list_troubleshooting(DOMAIN)
            await queue.operator_retry(DOMAIN, parked.command_id, data=2, operator="ana", reason="sign")
            assert (await settled(reader, bad)).status == CommandStatus.COMPLETED
        later = await sender.send(DOMAIN, "Debit", 3)
        await sender.cancel(later)
        assert [event.event for event in await reader.get_audit_trail(later)] == ["SENT", "CANCELED"]


@pytest.mark.parametrize("kind", KINDS)
async def test_who_may_not_cancel_a_batch_does_not_close_it_either(login: Login, bus: CommandBus, kind: str) -> None:
    batch = await bus.create_batch(DOMAIN, [SendRequest(DOMAIN, "Debit", 1)], growing=True)
    async with CommandBus(login(kind)) as theirs:
        if kind == "operator":
            assert (await theirs.cancel_batch(DOMAIN, batch.batch_id, operator="ana")).done == 1
        else:
            with pytest.raises(PermissionDeniedError):
                await theirs.cancel_batch(DOMAIN, batch.batch_id)
    found = await bus.get_batch(DOMAIN, batch.batch_id)
    assert found.growing == (kind != "operator")


async def test_a_handler_sends_if_its_worker_may_send_too(login: Login, bus: CommandBus) -> None:
    async def pass_on(command: Command, context: HandlerContext) -> None:
        await context.bus.send(DOMAIN, "Echo", command.data)

    handlers = registry_of(PassOn=pass_on, Echo=echo)
    async with CommandBus(login("worker", "sender")) as theirs, running(Worker(theirs, DOMAIN, handlers)):
        receipt = await bus.send(DOMAIN, "PassOn", 1)
        assert (await settled(bus, receipt)).status == CommandStatus.COMPLETED
    async with CommandBus(login("worker")) as theirs, running(Worker(theirs, DOMAIN, handlers)):
        receipt = await bus.send(DOMAIN, "PassOn", 2)
        found = await settled(bus, receipt)
        assert found.status == CommandStatus.IN_TROUBLESHOOTING_QUEUE
        assert found.error is not None
        assert found.error.code == "PermissionDeniedError"
        assert found.error.message.endswith("for the role commandbus_sender")


VERBS: dict[str, Callable[[CommandBus, Receipt], Awaitable[object]]] = {
    "send": lambda bus, _: bus.send(DOMAIN, "Debit", 1),
    "send_batch": lambda bus, _: bus.send_batch([SendRequest(DOMAIN, "Debit", 1)]),
    "get_command": lambda bus, sent: bus.get_command(sent),
    "query_commands": lambda bus, _: bus.query_commands(),
    "get_audit_trail": lambda bus, sent: bus.get_audit_trail(sent),
    "count": lambda bus, _: bus.count(),
    "stats": lambda bus, _: bus.stats(),
    "list_troubleshooting": lambda bus, _: TroubleshootingQueue(bus).list_troubleshooting(DOMAIN),
    "operator_retry": lambda bus, parked: TroubleshootingQueue(bus).operator_retry(
        DOMAIN, parked.command_id, operator="ana"
    ),
    "cancel": lambda bus, sent: bus.cancel(sent),
}
READS = {"get_command", "query_commands", "get_audit_trail", "count", "stats", "list_troubleshooting"}
MAY = {
    "sender": {"send", "send_batch", "cancel"},
    "worker": set(),
    "operator": {*READS, "operator_retry", "cancel"},
    "reader": READS,
}


@pytest.mark.parametrize("kind", KINDS)
async def test_each_login_is_told_which_role_it_lacks(login: Login, bus: CommandBus, kind: str) -> None:
    async def refuse(command: Command, context: HandlerContext) -> None:
        raise PermanentCommandError("NO")

    receipt = await bus.send(DOMAIN, "Refuse", 1)
    async with running(Worker(bus, DOMAIN, registry_of(Refuse=refuse))):
        await settled(bus, receipt)
    refused: dict[str, str] = {}
    async with CommandBus(login(kind)) as theirs:
        for verb, call in VERBS.items():
            try:
                await call(theirs, receipt)
            except PermissionDeniedError as error:
                refused[verb] = str(error)
        await theirs.wake(DOMAIN)  # a hint: never an error
    assert VERBS.keys() - refused.keys() == MAY[kind]
    for verb, said in refused.items():
        assert said.startswith("permission denied for ")
        assert any(f"commandbus_{other}" in said for other in KINDS if verb in MAY[other])
        assert f"commandbus_{kind}" not in said


async def test_a_worker_without_the_role_says_so_and_goes_on_trying(
    login: Login, caplog: pytest.LogCaptureFixture
) -> None:
    async with CommandBus(login("sender")) as theirs, running(Worker(theirs, DOMAIN, registry_of(Echo=echo))):
        await until(lambda: "for the role commandbus_worker" in caplog.text, "a warning")


async def test_a_login_without_a_role_does_not_open_the_bus(login: Login) -> None:
    with pytest.raises(PermissionDeniedError, match=r"schema commandbus: .*_sender or .*_worker or .*_reader$"):
        await CommandBus(login()).open()


@async_only("has an async connection")
async def test_a_send_on_a_connection_of_the_callers_is_refused_in_the_same_words(
    login: Login, bus: CommandBus, connect: Connect
) -> None:
    says = r"function send_v1: .* commandbus_sender$"
    async with await psycopg.AsyncConnection.connect(login("reader")) as theirs:
        with pytest.raises(PermissionDeniedError, match=says):
            await bus.send(DOMAIN, "Debit", 1, connection=theirs)
    blocking = connect()
    blocking.execute("SET ROLE commandbus_reader")
    with pytest.raises(PermissionDeniedError, match=says):
        await bus.send(DOMAIN, "Debit", 1, connection=blocking)
