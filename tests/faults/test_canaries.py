"""A password and a payload are canaries: neither shows up where it does not belong, whatever goes wrong."""

from __future__ import annotations

import asyncio
import logging
import traceback
from collections.abc import Awaitable, Callable, Iterator
from datetime import timedelta
from pathlib import Path
from uuid import UUID

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from commandbus import (
    Command,
    CommandBus,
    CommandBusError,
    HandlerContext,
    HandlerRegistry,
    PermanentCommandError,
    Receipt,
    RetryPolicy,
    Worker,
)
from commandbus.embedded import EmbeddedPostgres
from commandbus.migrate import migrate
from commandbus.sync import SyncCommandBus, SyncRuntime
from tests.bus.support import DOMAIN, Connection, Gate, one, rows, terminate
from tests.worker.support import all_settled, running

CANARY = "canary"
ID = UUID(int=7)


def told(error: BaseException) -> str:
    """All that is shown of an exception, and what those of the library say that a traceback leaves out."""
    seen = "".join(traceback.format_exception(error))
    behind: BaseException | None = error
    while behind is not None:
        if isinstance(behind, CommandBusError):
            seen += f"{behind} {behind!r} {behind.args} {getattr(behind, '__notes__', '')}"
        behind = behind.__cause__ or behind.__context__
    return seen


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[], str]]:
    """All that the library logs, from DEBUG on."""
    caplog.set_level(logging.DEBUG, "commandbus")

    def text() -> str:
        ours = [record for record in caplog.get_records("call") if record.name.startswith("commandbus")]
        return "\n".join(str(vars(record) | {"msg": record.getMessage()}) for record in ours)

    yield text
    assert CANARY not in text()


# -- the password ------------------------------------------------------------------------------------------------------

WRONG_DSNS = [
    "canary", "host=nowhere passwort=canary", "host=nowhere password=x canary", "host=nowhere password='canary",
    "host=nowhere password=canary\\", "host=nowhere password=canary\0", "host=nowhere password=canary\ud800",
    "postgresql://ana:%zzcanary@nowhere/shop", "postgresql://ana:a@canary@nowhere/shop",
    "postgresql://ana:a/canary@nowhere/shop", "postgresql://ana:a?canary@nowhere/shop",
    "postgresql://ana:canary@[::1/shop", "postgresql://ana:canary@nowhere:port/shop",
    "postgresql://ana:a@b:canary@nowhere/shop", "postgresql://ana:canary@localhost/shop?sslmode=wrong",
    "host=localhost port=1 password=canary connect_timeout=soon", "host=localhost password=canary port=99999",
    "host=localhost password=canary hostaddr=nowhere", "password=canary service=nowhere",
    "host=localhost port=1 password=canary target_session_attrs=wrong", "host=/nowhere password=canary",
    "host=localhost port=1 password=canary",
]  # fmt: skip


@pytest.mark.parametrize("dsn", WRONG_DSNS, ids=ascii)
def test_a_dsn_that_leads_nowhere_is_a_typed_error_without_its_password(
    dsn: str, log: Callable[[], str], show: Callable[..., str]
) -> None:
    async def open_bus() -> None:
        await CommandBus(dsn).open()

    def open_blocking_bus() -> None:
        with SyncRuntime() as runtime:
            SyncCommandBus(dsn, runtime=runtime).open()

    for use in (lambda: asyncio.run(open_bus()), open_blocking_bus, lambda: migrate(dsn)):
        with pytest.raises(CommandBusError) as caught:
            use()
        assert CANARY not in told(caught.value)
    if not {"\0", "\ud800"} & set(dsn):  # no process can be given one
        for command in ("list", "doctor"):
            said = show(dsn, command)
            assert said
            assert CANARY not in said


def test_a_wrong_password_is_not_shown(tmp_path: Path, show: Callable[..., str]) -> None:
    rules = tmp_path / "hba.conf"
    rules.write_text("local all ana scram-sha-256\nlocal all all trust\n")
    with EmbeddedPostgres(tmp_path / "data", settings={"hba_file": str(rules)}) as server:
        with psycopg.connect(server.dsn(), autocommit=True) as owner:
            owner.execute("CREATE ROLE ana LOGIN PASSWORD 'right'")
        dsn = make_conninfo(server.dsn(), user="ana", password=CANARY)
        with pytest.raises(CommandBusError, match="password authentication failed") as caught:
            migrate(dsn)
        assert CANARY not in told(caught.value)
        said = show(dsn, "doctor")
        assert "password authentication failed" in said
        assert CANARY not in said


# -- the payload -------------------------------------------------------------------------------------------------------


async def test_a_payload_is_in_no_error_log_or_statement(dsn: str, db: Connection, log: Callable[[], str]) -> None:
    """Nor is the password, which this server takes as it is."""
    db.execute("ALTER TABLE commandbus.command ADD CONSTRAINT refused CHECK (data <> '\"canary refused\"')")
    gate = Gate(db)
    gate.shut("Shut")
    dsn = make_conninfo(dsn, password=CANARY)
    headers = {"note": CANARY}
    async with CommandBus(dsn) as bus, CommandBus(dsn, send_timeout=timedelta(milliseconds=300)) as hasty:
        await bus.send(DOMAIN, "Debit", CANARY, command_id=ID, headers=headers, correlation_id=CANARY)
        failing: dict[str, Callable[[], Awaitable[object]]] = {
            "a NUL": lambda: bus.send(DOMAIN, "Debit", {"note": f"{CANARY}\0"}),
            "a class": lambda: bus.send(DOMAIN, "Debit", [CANARY.encode()]),
            "a size": lambda: bus.send(DOMAIN, "Debit", CANARY * 100_000),
            "a header": lambda: bus.send(DOMAIN, "Debit", 1, headers={"note": f"{CANARY}\ud800"}),
            "a correlation id": lambda: bus.send(DOMAIN, "Debit", 1, correlation_id=CANARY * 100),
            "a conflict": lambda: bus.send(DOMAIN, "Debit", [CANARY], command_id=ID),
            "a refusal": lambda: bus.send(DOMAIN, "Debit", f"{CANARY} refused"),
            "a deadline": lambda: hasty.send(DOMAIN, "Shut", CANARY, headers=headers),
            "an operator": lambda: bus.cancel(DOMAIN, UUID(int=8), operator="ana", reason=CANARY),
        }
        for what, fail in failing.items():
            with pytest.raises(CommandBusError) as caught:
                await fail()
            assert CANARY not in told(caught.value), what
        assert CANARY not in f"{bus!r} {vars(bus)['_database']!r} {Worker(bus, DOMAIN, registry())!r}"
        statements = rows(db, "SELECT query, application_name FROM pg_stat_activity WHERE pid <> pg_backend_pid()")
        assert any("send_v1" in query for query, _ in statements)
        assert CANARY not in str(statements)
        terminate(db, "send_v1")
        gate.open()


def registry() -> HandlerRegistry:
    """Handlers that do what they can to have their command's data told."""
    registry = HandlerRegistry()

    @registry.handler(DOMAIN, "Raise", retry=RetryPolicy(1))
    async def fail(command: Command, context: HandlerContext) -> None:
        raise ValueError(command.data)

    @registry.handler(DOMAIN, "Park")
    def park(command: Command, context: HandlerContext) -> None:
        raise PermanentCommandError("PARKED", command.data, {"data": command.data})

    @registry.handler(DOMAIN, "Return")
    async def unfit(command: Command, context: HandlerContext) -> object:
        return {"data": command.data.encode()}

    @registry.handler(DOMAIN, "Refused", transactional=True)
    async def refused(command: Command, context: HandlerContext) -> object:
        return f"{command.data} refused"

    @registry.handler(DOMAIN, "Late", timeout=timedelta(milliseconds=10), retry=RetryPolicy(1))
    async def late(command: Command, context: HandlerContext) -> None:
        await asyncio.Event().wait()

    return registry


async def test_a_failure_shows_its_payload_to_operators_only(dsn: str, db: Connection, log: Callable[[], str]) -> None:
    db.execute("ALTER TABLE commandbus.command_history ADD CHECK (result <> '\"canary refused\"')")
    async with CommandBus(make_conninfo(dsn, password=CANARY)) as bus:
        sent: list[Receipt] = [
            await bus.send(DOMAIN, kind, CANARY, headers={"note": CANARY}, correlation_id=CANARY)
            for kind in ("Raise", "Park", "Return", "Refused", "Late")
        ]
        async with running(Worker(bus, DOMAIN, registry())):
            commands = await all_settled(bus, sent)
        codes = [command.error.code if command.error else None for command in commands]
        assert codes == ["ValueError", "PARKED", None, "UNSTORABLE", "TIMEOUT"]
        assert all(str(command.command_id) in log() for command in commands)
        parked = commands[1].error
        assert parked is not None
        assert parked.message == CANARY
        assert (
            one(
                db,
                "SELECT count(*) FROM pg_stat_activity WHERE query LIKE '%%canary%%' AND pid <> %s",
                db.info.backend_pid,
            )
            == 0
        )
