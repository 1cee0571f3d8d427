"""The command line's `list`, `stats`, `workers` and the reason that `show` gives, as processes."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import psycopg
import pytest

from tests.acceptance.cli_support import CommandLine, Park, environment, running, worker
from tests.bus.support import fail, lease
from tests.support import eventually


def ids(listing: str) -> list[str]:
    return re.findall(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}", listing)


def announce(db: psycopg.Connection, *types: str, domain: str = "shop", name: str = "w1") -> None:
    db.execute("select commandbus.announce_v1(%s, %s, %s, 5)", [name, domain, list(types)])


# -- list --------------------------------------------------------------------------------------------------------------


def test_list(cli: CommandLine, park: Park) -> None:
    assert cli("list").stdout == "no such commands\n"
    assert cli.json("list") == {"items": [], "next_cursor": None}
    parked = park()
    delayed = cli.send("shop", "Buy", delay=timedelta(hours=1))
    other = cli.send("stock", "Log")
    text = cli("list").stdout
    assert ids(text) == [other, delayed, parked]
    assert re.search(rf"{parked}  Buy  IN_TROUBLESHOOTING_QUEUE  attempts=1\n    NO_STOCK: none left\n", text)
    assert re.search(rf"{delayed}  Buy  SCHEDULED  due=20[0-9TZ:-]+\n", text)

    def listed(*options: str) -> list[str]:
        return [item["command_id"] for item in cli.json("list", *options)["items"]]

    assert listed("--domain", "shop") == [delayed, parked]
    assert listed("--type", "Log") == [other]
    assert listed("--status", "in_troubleshooting_queue") == [parked]
    page = cli.json("list", "--limit", "2")
    assert [item["command_id"] for item in page["items"]] == [other, delayed]
    assert listed("--cursor", page["next_cursor"]) == [parked]
    assert f"there are more: --cursor {page['next_cursor']}" in cli("list", "--limit", "2").stdout


def test_list_since(cli: CommandLine, db: psycopg.Connection) -> None:
    old, young = cli.send("shop", "Buy"), cli.send("shop", "Buy")
    db.execute("update commandbus.command set sent_at = sent_at - interval '2 h' where command_id = %s", [old])
    assert ids(cli("list", "--since", "1h").stdout) == [young]
    assert ids(cli("list", "--since", "3h").stdout) == [young, old]


@pytest.mark.parametrize("options", [[], ["--json"], ["--domain", "shop", "--json"]])
def test_follow_prints_what_is_new_and_what_has_changed(
    cli: CommandLine, db: psycopg.Connection, tmp_path: Path, options: list[str]
) -> None:
    first = cli.send("shop", "Buy")
    with running("list", "--follow", *options, dsn=cli.dsn, folder=tmp_path) as process:

        def told() -> list[tuple[str, str]]:
            lines = (tmp_path / "out").read_text().splitlines()
            if "--json" in options:
                return [(command["command_id"], command["status"]) for command in map(json.loads, lines)]
            return [(line.split()[2], line.split()[4]) for line in lines]

        expected = [(first, "PENDING")]
        eventually(lambda: told() == expected, timeout=30, what="the first command")
        second = cli.send("shop", "Buy")
        expected += [(second, "PENDING")]
        eventually(lambda: told() == expected, what="the second command")
        db.execute("select commandbus.cancel_v1('shop', %s, 'ana', 'over')", [first])
        expected += [(first, "CANCELED")]
        eventually(lambda: told() == expected, what="the change of the first")
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
    assert told() == expected
    assert (tmp_path / "err").read_text() == ""


# -- stats and workers -------------------------------------------------------------------------------------------------


def test_stats(cli: CommandLine, db: psycopg.Connection, park: Park) -> None:
    assert cli("stats").stdout == "no unfinished commands\n"
    park()
    cli.send("shop", "Buy")
    cli.send("stock", "Log")
    announce(db, "Buy")
    announce(db, "Buy", name="dead")
    db.execute("update commandbus.worker set seen_at = seen_at - interval '1 h' where worker = 'dead'")
    db.execute("update commandbus.command set sent_at = sent_at - interval '125 min' where status = 'PENDING'")
    assert re.fullmatch(
        "unfinished commands\n"
        r"  shop  Buy  IN_TROUBLESHOOTING_QUEUE  1  oldest=\d+s\n"
        "  shop  Buy  PENDING  1  oldest=2h\n"
        "  stock  Log  PENDING  1  oldest=2h\n"
        "living workers\n  shop  1\n  stock  0\n",
        cli("stats").stdout,
    )
    found = cli.json("stats", "--domain", "shop")
    assert found["workers"] == {"shop": 1}
    assert [(count["status"], count["count"]) for count in found["unfinished"]] == [
        ("IN_TROUBLESHOOTING_QUEUE", 1),
        ("PENDING", 1),
    ]


def test_stats_watch_prints_a_block_again_and_again(cli: CommandLine, tmp_path: Path) -> None:
    with running("stats", "--watch", dsn=cli.dsn, folder=tmp_path) as process:

        def told() -> str:
            return (tmp_path / "out").read_text()

        eventually(lambda: told() == "no unfinished commands\n", timeout=30, what="a first block")
        cli.send("shop", "Buy")
        eventually(lambda: "shop  Buy  PENDING  1" in told(), what="a block with the command")
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    assert told().startswith("no unfinished commands\n")
    assert "\x1b" not in told()
    assert (tmp_path / "err").read_text() == ""


def test_stats_watch_draws_a_terminal_anew(cli: CommandLine) -> None:
    reading, writing = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "commandbus", "stats", "--watch"],
        stdin=writing, stdout=writing, stderr=writing, env=environment(cli.dsn),
    )  # fmt: skip
    os.close(writing)
    with open(reading, "rb", closefd=True, buffering=0) as screen:  # noqa: PTH123 - it is no path
        shown = b""
        while shown.count(b"\x1b[H\x1b[2J") < 2:
            shown += screen.read(4096)
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
    assert b"no unfinished commands" in shown


def test_workers(cli: CommandLine, shop: Path, db: psycopg.Connection) -> None:
    assert cli("workers").stdout == "no worker has announced itself\n"
    assert cli.json("workers") == []
    with worker(cli, shop, "--domain", "shop", "--concurrency", "7") as process:
        (found,) = eventually(lambda: cli.json("workers"), what="the worker's row")
        assert (found["domain"], found["concurrency"], found["alive"]) == ("shop", 7, True)
        assert sorted(found["command_types"]) == ["Buy", "Crash", "Refuse", "Relay", "Slow"]
        assert re.match(rf"  shop  {found['worker']}  alive  concurrency=7  started_at=20", cli("workers").stdout)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    assert cli.json("workers") == []
    announce(db, "Buy")
    db.execute("update commandbus.worker set seen_at = seen_at - interval '1 h'")
    assert "  shop  w1  gone  " in cli("workers", "--domain", "shop").stdout
    assert cli.json("workers", "--domain", "stock") == []


# -- why it waits ------------------------------------------------------------------------------------------------------


def test_show_says_why_a_command_waits(cli: CommandLine, db: psycopg.Connection, park: Park) -> None:
    def waiting(command_id: str) -> str:
        (line,) = re.findall(r"^waiting +(.*)$", cli("show", command_id).stdout, re.MULTILINE)
        return str(line)

    parked, command_id = park(), cli.send("shop", "Buy")
    assert waiting(parked) == "it is parked: an operator has to decide"
    assert waiting(command_id) == "no worker for its domain is alive"
    announce(db, "Sell")
    assert waiting(command_id) == "no living worker knows its type"
    assert cli.json("show", command_id)["waiting"]["reason"] == "NO_WORKER_FOR_TYPE"
    announce(db, "Buy")
    assert waiting(command_id) == "it waits in line, behind no other"
    db.execute("select commandbus.cancel_v1('shop', %s, 'ana', 'over')", [command_id])
    assert "waiting" not in cli("show", command_id).stdout
    assert cli.json("show", command_id)["waiting"] is None


def test_show_tells_each_failed_attempt(cli: CommandLine, db: psycopg.Connection, park: Park) -> None:
    command_id = park(code="FIRST", message="bank is away")
    cli("troubleshooting", "retry", "shop", command_id)
    item = lease(db, "Buy", domain="shop")
    assert fail(db, item, "TRANSIENT", domain="shop") == "done"
    text = cli("show", command_id).stdout
    assert re.search(r"^waiting +an attempt failed: it is tried again at 20.*Z; no living worker", text, re.MULTILINE)
    assert re.search(r"PARKED .*attempt=1 .*\n    FIRST: bank is away\n", text)
    assert re.search(r"ATTEMPT_FAILED .*attempt=1 .*\n    X: m\n", text)
