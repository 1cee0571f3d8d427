"""An operator's hour: 2,000 commands of three kinds of failure are parked, and put right by the command line alone."""

from __future__ import annotations

import asyncio
import re
import signal
from pathlib import Path

import psycopg
import pytest

from commandbus import (
    Command,
    CommandBus,
    HandlerContext,
    HandlerRegistry,
    PermanentCommandError,
    SendRequest,
    Worker,
)
from tests.acceptance.cli_support import CommandLine, running
from tests.support import aeventually, eventually

registry = HandlerRegistry()


@registry.handler("shop", "Buy")
async def buy(command: Command, context: HandlerContext) -> None:
    if command.data["currency"] == "EURO":
        raise PermanentCommandError("CURRENCY", f"order {command.data['order']}: 'EURO' is no currency")
    raise PermanentCommandError("NO_STOCK", f"order {command.data['order']}: shelf {command.command_id} is empty")


@registry.handler("shop", "Ship")
async def ship(command: Command, context: HandlerContext) -> None:
    raise PermanentCommandError("CARRIER", f"the carrier refused parcel {command.data['order']}", {"tries": 3})


SENT = [
    *(SendRequest("shop", "Buy", {"order": n, "currency": "EURO"}) for n in range(1000)),
    *(SendRequest("shop", "Buy", {"order": n, "currency": "EUR"}) for n in range(700)),
    *(SendRequest("shop", "Ship", {"order": n}) for n in range(300)),
]


@pytest.fixture
async def parked(dsn: str) -> None:
    """A worker takes all that is sent, and parks it."""
    async with CommandBus(dsn) as bus:
        await bus.send_batch(SENT)
        worker = Worker(bus, "shop", registry, concurrency=200)
        running = asyncio.ensure_future(worker.run())

        async def all_parked() -> bool:
            return {stat.status for stat in await bus.stats()} == {"IN_TROUBLESHOOTING_QUEUE"}

        await aeventually(all_parked, timeout=60, what="2,000 parked commands")
        worker.stop()
        await running


Rows = dict[str, tuple[str, str]]


def parked_rows(db: psycopg.Connection) -> Rows:
    """Every column of the parked commands and of their events, by id."""
    sql = """
        SELECT c.command_id::text, c::text, string_agg(e::text, ' ' ORDER BY e.event_no)
        FROM commandbus.command c JOIN commandbus.audit_event e USING (domain, command_id)
        WHERE c.parked_at IS NOT NULL GROUP BY c.domain, c.command_id"""
    return {row[0]: (row[1], row[2]) for row in db.execute(sql)}


def test_an_operators_hour(cli: CommandLine, db: psycopg.Connection, parked: None, tmp_path: Path) -> None:
    at_first = parked_rows(db)
    assert len(at_first) == 2000

    # What is wrong? Three things.
    groups = cli.json("troubleshooting", "groups", "shop")
    assert [(group["command_type"], group["error_code"], group["count"]) for group in groups] == [
        ("Buy", "CURRENCY", 1000), ("Buy", "NO_STOCK", 700), ("Ship", "CARRIER", 300),
    ]  # fmt: skip
    currency, no_stock, carrier = ([f"--group={group['fingerprint']}"] for group in groups)
    samples = [group["sample_ids"][0] for group in groups]

    # The first was a bug of the sender: its data is put right.
    right = ["troubleshooting", "retry", "shop", *currency, "--patch", '{"currency": "EUR"}', "--operator", "ana"]
    assert cli.json(*right, "--dry-run")["count"] == 1000
    assert parked_rows(db) == at_first
    assert cli.json(*right, "--reason", "EURO is EUR", "--count", "1000", remarks=True)["done"] == 1000
    after_the_retry = parked_rows(db)
    assert len(after_the_retry) == 1000

    # The second is not wanted any more.
    given_up = ["troubleshooting", "cancel", "shop", *no_stock, "--operator", "bob", "--reason", "sold out for good"]
    assert cli.json(*given_up, "--count", "700", remarks=True)["done"] == 700
    after_the_cancel = parked_rows(db)
    assert len(after_the_cancel) == 300

    # The third is tried again, gently; half-way the carrier asks to stop.
    again = ["troubleshooting", "retry", "shop", *carrier, "--operator", "cleo", "--reason", "carrier is back"]
    with running(*again, "--count", "300", "--rate", "50", dsn=cli.dsn, folder=tmp_path) as process:
        eventually(lambda: progress(tmp_path) >= 150, timeout=60, what="a retry that is half-way")
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
    last = (tmp_path / "err").read_text().splitlines()[-1]
    said = re.fullmatch(r"commandbus: interrupted: (\d+) of 300 commands are done, (\d+) are not", last)
    assert said, last
    done, left = int(said[1]), int(said[2])
    at_last = parked_rows(db)
    assert (done + left, len(at_last)) == (300, left)
    assert 150 <= done < 300

    # Each did what it said, and nothing else.
    assert at_last.items() <= after_the_cancel.items() <= after_the_retry.items() <= at_first.items()
    assert by_operator(db) == {
        ("ana", "OPERATOR_RETRIED", "EURO is EUR"): 1000,
        ("bob", "OPERATOR_CANCELED", "sold out for good"): 700,
        ("cleo", "OPERATOR_RETRIED", "carrier is back"): done,
    }
    edited = cli.json("show", samples[0])
    assert edited["command"]["data"]["currency"] == "EUR"
    assert edited["audit_trail"][-1]["details"]["old_data"]["currency"] == "EURO"
    assert cli.json("show", samples[1])["command"]["status"] == "CANCELED"
    assert cli.json("troubleshooting", "groups", "shop")[0]["count"] == left


def progress(folder: Path) -> int:
    """How many were retried, as the process told last."""
    told = re.findall(r"^retried (\d+) of 300$", (folder / "err").read_text(), re.MULTILINE)
    return int(told[-1]) if told else 0


def by_operator(db: psycopg.Connection) -> dict[tuple[str, str, str], int]:
    """How many actions of operators the audit trail has, by operator, event and reason."""
    sql = """SELECT operator, event, reason, count(DISTINCT command_id) FROM commandbus.audit_trail
             WHERE operator IS NOT NULL GROUP BY 1, 2, 3 HAVING count(*) = count(DISTINCT command_id)"""
    return {(row[0], row[1], row[2]): row[3] for row in db.execute(sql)}
