"""The command line's `batch`, as a process."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from uuid import uuid4

import psycopg
import pytest

from commandbus import Batch, SendRequest
from commandbus.sync import SyncCommandBus
from tests.acceptance.cli_support import CommandLine, environment
from tests.bus.support import fail, lease


def create(dsn: str, count: int) -> Batch:
    with SyncCommandBus(dsn) as bus:
        return bus.create_batch("shop", [SendRequest("shop", "Buy", n) for n in range(count)], name="nightly")


def test_list_and_show(cli: CommandLine, dsn: str) -> None:
    assert cli("batch", "list").stdout == "no such batches\n"
    batch = create(dsn, 2)
    ended = create(dsn, 0)
    text = cli("batch", "list").stdout
    assert text.index(str(ended.batch_id)) < text.index(str(batch.batch_id))
    assert "shop" in text
    assert "2 total, 0 completed, 0 failed, 0 canceled, 0 in trouble, 2 open" in text

    def listed(*options: str) -> list[str]:
        return [item["batch_id"] for item in cli.json("batch", "list", *options)["items"]]

    assert listed("--finished") == [str(ended.batch_id)]
    assert listed("--unfinished", "--domain", "shop") == [str(batch.batch_id)]
    assert "progress" in cli("batch", "show", "shop", str(batch.batch_id)).stdout
    shown = cli.json("batch", "show", "shop", str(batch.batch_id))
    assert (shown["name"], shown["total"], shown["done"], shown["progress"]) == ("nightly", 2, False, 0.0)


def test_one_that_is_not_there(cli: CommandLine) -> None:
    nobody = str(uuid4())
    refused = cli("batch", "show", "shop", nobody, code=1)
    assert nobody in refused.stderr


def test_retry_cancel_and_watch(cli: CommandLine, dsn: str, db: psycopg.Connection) -> None:
    batch = create(dsn, 3)
    where = ("shop", str(batch.batch_id))
    fail(db, lease(db, "Buy", domain="shop"), "PERMANENT", domain="shop")
    assert cli.json("batch", "show", *where)["in_trouble"] == 1
    assert cli("batch", "retry", *where, "--operator", "ana").stdout == "retried: 1\n"
    assert cli.json("batch", "show", *where)["open"] == 3
    assert cli("batch", "cancel", *where, "--operator", "ana", "--reason", "no").stdout == "canceled: 3\n"
    assert cli("batch", "watch", *where).stdout == (
        "finished: 3 total, 0 completed, 0 failed, 3 canceled, 0 in trouble, 0 open\n"
    )
    (line,) = cli("batch", "watch", *where, "--json").stdout.splitlines()
    assert json.loads(line)["done"]


@pytest.mark.parametrize(
    ("verb", "function", "said"),
    [
        ("retry", "operator_bulk_v1", "retried: 0, 1 no longer parked, or parked anew\n"),
        ("cancel", "cancel_bulk_v1", "canceled: 0, 1 ended meanwhile\n"),
    ],
)
def test_what_was_quicker_is_told(
    cli: CommandLine, db: psycopg.Connection, verb: str, function: str, said: str
) -> None:
    batch = create(cli.dsn, 1)
    fail(db, lease(db, "Buy", domain="shop"), "PERMANENT", domain="shop")
    db.execute(
        f"DROP FUNCTION commandbus.{function}; CREATE FUNCTION commandbus.{function}(VARIADIC given text[]) "
        "RETURNS TABLE (command_id uuid, outcome text) LANGUAGE sql AS $$ SELECT (item ->> 'command_id')::uuid, "
        "'changed' FROM unnest(given) items, json_array_elements(items::json) item WHERE items LIKE '[%' $$".encode()
    )
    done = cli("batch", verb, "shop", str(batch.batch_id), "--operator", "ana", "--reason", "why")
    assert done.stdout == said


def test_on_a_terminal_a_bar_is_shown(dsn: str) -> None:
    batch = create(dsn, 0)
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "commandbus", "batch", "watch", "shop", str(batch.batch_id)]
    with subprocess.Popen(command, stdout=theirs, env=environment(dsn)) as process:
        os.close(theirs)
        shown = b""
        while b"finished" not in shown:
            shown += os.read(ours, 1000)
        assert process.wait() == 0
    os.close(ours)
    assert "━".encode() in shown
