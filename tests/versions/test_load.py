"""Both versions under load on one database: side by side, and through a deployment."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psycopg
import pytest

from commandbus.migrate import migrate, migrations
from tests.support import eventually
from tests.versions.support import DOMAIN, Client, Crew, Sender, Version, all_handled, rows

ENDS = {"Echo": "COMPLETED", "Book": "COMPLETED", "Retry": "COMPLETED", "Refuse": "FAILED"}
QUICK = pytest.param(800, id="quick")
LONG = pytest.param(8000, id="long", marks=pytest.mark.long)
MIGRATION_WAITS = """
    SELECT FROM pg_stat_activity WHERE application_name = 'commandbus migrate' AND wait_event_type = 'Lock'"""


def assert_all_right(crew: Crew, senders: list[Sender], workers: set[str]) -> None:
    """Each command that was sent is there once, and ended as its type asks; nobody met anything unexpected."""
    sent = {each.command_id: each for sender in senders for each in sender.sent}
    accepted = Counter(each.command_id for sender in senders for each in sender.sent if not each.duplicate)
    assert accepted == dict.fromkeys(sent, 1)  # of those who sent the same, the first
    found = rows(crew.dsn, "SELECT command_id::text, command_type, status, data, result FROM commandbus.commands")
    assert {row[0] for row in found} == sent.keys()
    for command_id, command_type, status, data, result in found:
        assert (command_type, data["n"]) == (sent[command_id].command_type, sent[command_id].number)
        if command_type in ENDS:
            assert status == ENDS[command_type]
        assert status != "COMPLETED" or result["n"] == data["n"]
    booked = rows(crew.dsn, "SELECT command_id::text, worker FROM public.booking")
    assert sorted(booked) == sorted((row[0], row[4]["by"]) for row in found if row[1] == "Book")
    assert {row[4]["by"] for row in found if row[2] == "COMPLETED"} == workers
    assert [(process.log.name, process.unexpected()) for process in crew.processes if process.unexpected()] == []


def mend(parked: list[dict[str, Any]], operator: Client) -> None:
    """Retry with data that will do, and withdraw every fifth."""
    for number, command in enumerate(parked):
        if number % 5:
            data = command["data"] | {"mended": True}
            answer = operator("operator_retry", DOMAIN, command["command_id"], data=data, operator="ada", reason="new")
        else:
            answer = operator("cancel", DOMAIN, command["command_id"], operator="ada", reason="not needed")
        assert answer is None


def tell(what: str, figure: object) -> None:
    """Print a figure, for `-rP`: it says how fast this machine is, and decides nothing."""
    sys.stdout.write(f"{what}: {figure}\n")


def rate(sender: Sender) -> int:
    """How many commands it sent a second."""
    begins = [began for began, _ in sender.waits]
    return round(len(begins) / (max(begins) - min(begins)))


@pytest.mark.timeout(300)
@pytest.mark.parametrize("count", [QUICK, LONG])
def test_both_send_and_work_side_by_side(crew: Crew, old: Version, new: Version, count: int) -> None:
    workers = [crew.worker(old), crew.worker(new), crew.worker(new, "sync")]
    senders = [crew.sender(old, "async", 300), crew.sender(new, "async", 150), crew.sender(new, "sync", 150)]
    for sender, share in zip(senders, [2, 1, 1], strict=True):
        sender.has_sent(count * share // 4)
    for sender in senders:
        sender.end()
    all_handled(crew.dsn)
    tell("sends a second, old and new", [rate(sender) for sender in senders])
    operators = [crew.client(old), crew.client(new)]
    lists = [operator("list_troubleshooting", DOMAIN, limit=1000) for operator in operators]
    assert lists[0] == lists[1]
    mend(lists[0][::2], operators[0])
    mend(lists[0][1::2], operators[1])
    all_handled(crew.dsn)
    sample = rows(crew.dsn, "SELECT DISTINCT ON (command_type, status) command_id::text FROM commandbus.commands")
    for (command_id,) in sample:
        assert len({str(operator("get_audit_trail", DOMAIN, command_id)) for operator in operators}) == 1
    for worker in workers:
        worker.end()
    assert_all_right(crew, senders, {"0.1.0 async", "new async", "new sync"})


@pytest.mark.timeout(300)
@pytest.mark.parametrize("count", [QUICK, LONG])
def test_a_deployment_under_load_loses_nothing_and_holds_nobody_up(
    old_crew: Crew, old: Version, new: Version, count: int
) -> None:
    """As `docs/how-to/deploy-without-downtime.md` has it: the schema, then the workers, then the senders."""
    crew = old_crew
    old_workers = [crew.worker(old), crew.worker(old)]
    old_senders = [crew.sender(old, "async", 150), crew.sender(old, "async", 150)]
    old_senders[0].has_sent(count // 4)
    migrate_beside_a_report(crew.dsn, lambda: old_senders[0].has_sent(count // 4))
    new_workers = [crew.worker(new), crew.worker(new, "sync")]
    for worker in old_workers:
        worker.end()
    new_senders = [crew.sender(new, "async", 150), crew.sender(new, "sync", 150)]
    new_senders[0].has_sent(100)
    for sender in old_senders:
        sender.end()
    new_senders[0].has_sent(count // 4)
    for sender in new_senders:
        sender.end()
    all_handled(crew.dsn)
    for worker in new_workers:
        worker.end()
    tell("sends a second, old and new", [rate(sender) for sender in old_senders + new_senders])
    tell("seconds of the longest send", max(took for sender in old_senders for _, took in sender.waits))
    assert_all_right(crew, old_senders + new_senders, {"0.1.0 async", "new async", "new sync"})


def migrate_beside_a_report(dsn: str, meanwhile: Callable[[], None]) -> None:
    """Migrate while somebody reads a view for long, as somebody always does; the load must not wait for either."""
    with psycopg.connect(dsn) as report, ThreadPoolExecutor(1) as pool:
        report.execute("SELECT FROM commandbus.commands")
        migrating = pool.submit(migrate, dsn)
        try:
            eventually(lambda: rows(dsn, MIGRATION_WAITS), timeout=60, what="a migration that waits")
            meanwhile()
        finally:
            report.rollback()
        assert migrating.result() == [migration.name for migration in migrations()[1:]]
