"""Opening and closing: loops, schemas, DSNs."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from commandbus import (
    ClosedError,
    CommandBus,
    ConfigurationError,
    DatabaseUnavailableError,
    SchemaError,
    SendRequest,
    WrongLoopError,
)
from tests.bus.support import DOMAIN, Connection, ids
from tests.support import Route, async_only

USES: dict[str, Callable[[CommandBus], Awaitable[Any]]] = {
    "send": lambda bus: bus.send(DOMAIN, "Debit", {}),
    "send_batch": lambda bus: bus.send_batch([SendRequest(DOMAIN, "Debit", {})]),
    "wake": lambda bus: bus.wake(DOMAIN),
    "get_command": lambda bus: bus.get_command(DOMAIN, uuid4()),
    "query_commands": lambda bus: bus.query_commands(),
    "get_audit_trail": lambda bus: bus.get_audit_trail(DOMAIN, uuid4()),
    "explain": lambda bus: bus.explain(DOMAIN, uuid4()),
    "count": lambda bus: bus.count(),
    "stats": lambda bus: bus.stats(),
    "cancel": lambda bus: bus.cancel(DOMAIN, uuid4()),
}


@async_only("uses another loop")
async def test_another_loop_is_refused(bus: CommandBus, db: Connection) -> None:
    async def elsewhere() -> None:
        for use in USES.values():
            with pytest.raises(WrongLoopError, match="another event loop"):
                await use(bus)

    await asyncio.to_thread(lambda: asyncio.run(elsewhere()))
    assert ids(db) == []


@async_only("the blocking bus opens by itself")
async def test_a_bus_is_open_between_open_and_close(route: Route) -> None:
    bus = CommandBus(**route)
    for use in USES.values():
        with pytest.raises(ClosedError, match="async with"):
            await use(bus)
    async with bus:
        pass
    for use in USES.values():
        with pytest.raises(ClosedError):
            await use(bus)


@async_only("the blocking bus opens by itself")
async def test_a_bus_is_opened_once(route: Route) -> None:
    bus = CommandBus(**route)
    async with bus:
        with pytest.raises(ConfigurationError, match="open already"):
            await bus.open()
        assert await bus.count() == 0
    with pytest.raises(ClosedError, match="make a new one"):
        await bus.open()
    await bus.close()


@async_only("counts on the order of tasks")
async def test_closing_lets_sends_arrive(route: Route, db: Connection) -> None:
    bus = CommandBus(**route)
    await bus.open()
    sends = [asyncio.create_task(bus.send(DOMAIN, "Debit", n)) for n in range(100)]
    await asyncio.sleep(0)  # they are on their way
    await bus.close()
    assert sorted(ids(db)) == [receipt.command_id for receipt in await asyncio.gather(*sends)]


# -------------------------------------------------------------------------------------------- schemas


async def test_a_database_without_schema_names_the_command(empty_dsn: str) -> None:
    with pytest.raises(SchemaError, match="run `commandbus migrate`"):
        await CommandBus(empty_dsn).open()


async def test_a_schema_that_is_too_old_names_the_command(route: Route, db: Connection) -> None:
    db.execute("UPDATE commandbus.migration SET version = version - 1")
    with pytest.raises(SchemaError, match="run `commandbus migrate`"):
        await CommandBus(**route).open()


async def test_a_newer_schema_that_breaks_this_client_says_upgrade(route: Route, db: Connection) -> None:
    db.execute("INSERT INTO commandbus.migration (version, name, oldest_client) VALUES (9, '0009_x', 9)")
    with pytest.raises(SchemaError, match="upgrade the commandbus package"):
        await CommandBus(**route).open()


async def test_a_newer_schema_that_fits_is_used(route: Route, db: Connection) -> None:
    db.execute("INSERT INTO commandbus.migration (version, name, oldest_client) VALUES (9, '0009_x', 1)")
    async with CommandBus(**route) as bus:
        await bus.send(DOMAIN, "Debit", {})
    assert len(ids(db)) == 1


@pytest.mark.corrupts
async def test_a_schema_that_vanishes_names_the_command(bus: CommandBus, db: Connection) -> None:
    db.execute("DROP SCHEMA commandbus CASCADE")
    for use in (USES["send"], USES["count"], USES["cancel"]):
        with pytest.raises(SchemaError, match="run `commandbus migrate`"):
            await use(bus)


# ----------------------------------------------------------------------------------------------- DSNs


async def test_the_environment_is_read_at_construction(dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMMAND_BUS_DSN", dsn)
    bus = CommandBus()
    monkeypatch.setenv("COMMAND_BUS_DSN", "host=nowhere.invalid")
    async with bus:
        assert await bus.count() == 0


def test_without_a_dsn_both_ways_to_give_one_are_named() -> None:
    with pytest.raises(ConfigurationError, match="COMMAND_BUS_DSN"):
        CommandBus()


@pytest.mark.parametrize("dsn", ["host=x passwort=secret", "secret"])
def test_a_dsn_that_cannot_be_read_is_not_shown(dsn: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        CommandBus(dsn)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("wrong", [{"flush_connections": 0}, {"send_timeout": timedelta(0)}])
def test_options_have_bounds(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(wrong))):
        CommandBus("host=localhost", **wrong)


async def test_a_server_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("commandbus._database.CALL_SECONDS", 0.2)
    with pytest.raises(DatabaseUnavailableError, match="PostgreSQL") as caught:
        await CommandBus(f"host={tmp_path} user=postgres password=secret").open()
    assert "secret" not in str(caught.value)
