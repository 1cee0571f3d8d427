"""The command line's `send` and `show`, as processes."""

from __future__ import annotations

import functools
import json
import re
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psycopg
import pytest

from tests.acceptance.cli_support import HOSTILE, CommandLine, Park, at_once
from tests.support import eventually


def test_send_for_people(cli: CommandLine) -> None:
    lines = dict(line.split() for line in cli("send", "shop", "Buy", '{"n": 1}').stdout.splitlines())
    assert list(lines) == ["domain", "command_id", "duplicate"]
    assert (lines["domain"], lines["duplicate"]) == ("shop", "False")
    assert cli.json("show", lines["command_id"])["command"]["data"] == {"n": 1}


def test_send_with_everything(cli: CommandLine) -> None:
    command_id = str(uuid.uuid4())
    options = ["--id", command_id, "--delay", "2h", "--priority", "-5", "--max-attempts", "7", "--correlation-id",
               "c 1", "--reply-to", "billing", "--header", "a=b=c", "--header", "empty="]  # fmt: skip
    receipt = cli.json("send", "shop", "Buy", "[1]", *options)
    assert receipt == {"domain": "shop", "command_id": command_id, "duplicate": False}
    assert cli.json("send", "shop", "Buy", "[1]", *options)["duplicate"] is True
    command = cli.json("show", command_id)["command"]
    assert command["status"] == "SCHEDULED"
    assert command["data"] == [1]
    assert command["headers"] == {"a": "b=c", "empty": ""}
    assert (command["priority"], command["max_attempts"]) == (-5, 7)
    assert (command["correlation_id"], command["reply_to"]) == ("c 1", "billing")
    conflict = cli("send", "shop", "Buy", '["canary"]', *options, code=1)
    assert command_id in conflict.stderr
    assert "canary" not in conflict.stderr


def test_send_reads_stdin_and_files(cli: CommandLine, tmp_path: Path) -> None:
    text = '{"\u00e9": "\U0001f600"}'
    (tmp_path / "data.json").write_text(text, encoding="utf-8")
    for argument in ("-", f"@{tmp_path / 'data.json'}"):
        command_id = cli.json("send", "shop", "Buy", argument, stdin=text)["command_id"]
        assert cli.json("show", command_id)["command"]["data"] == {"\u00e9": "\U0001f600"}
    assert cli.json("show", cli.json("send", "shop", "Buy")["command_id"])["command"]["data"] == {}


def test_a_command_in_several_domains_wants_one_named(cli: CommandLine) -> None:
    command_id = str(uuid.uuid4())
    unknown = cli("show", command_id, code=1)
    assert unknown.stderr == f"commandbus: no command {command_id} in any domain\n"
    for domain in ("b", "a", "c"):
        cli.send(domain, "Other")
    cli.send("b", "Buy", command_id=uuid.UUID(command_id))
    assert cli.json("show", command_id)["command"]["domain"] == "b"
    cli.send("c", "Buy", command_id=uuid.UUID(command_id))
    result = cli("show", command_id, code=1)
    assert result.stdout == ""
    assert "several domains" in result.stderr
    assert result.stderr.endswith("--domain: b, c\n")
    assert cli.json("show", command_id, "--domain", "c")["command"]["domain"] == "c"
    assert f"no command {command_id}" in cli("show", command_id, "--domain", "a", code=1).stderr


def test_show_tells_why(cli: CommandLine, db: psycopg.Connection, park: Park) -> None:
    command_id = park('{"sku": 7}')
    cli(
        "troubleshooting",
        "retry",
        "shop",
        command_id,
        "--operator",
        "ana",
        "--reason",
        "refilled",
        "--data",
        '{"sku": 8}',
    )
    found = cli.json("show", command_id)
    assert list(found) == ["command", "waiting", "audit_trail"]
    assert [(e["event"], e["to_status"]) for e in found["audit_trail"]] == [
        ("SENT", "PENDING"),
        ("CLAIMED", "IN_PROGRESS"),
        ("PARKED", "IN_TROUBLESHOOTING_QUEUE"),
        ("OPERATOR_RETRIED", "PENDING"),
    ]
    parked, retried = found["audit_trail"][2:]
    assert parked["error"]["message"] == "none left"
    assert (retried["operator"], retried["reason"]) == ("ana", "refilled")
    assert retried["details"] == {"old_data": {"sku": 7}, "new_data": {"sku": 8}}
    text = cli("show", command_id).stdout
    for piece in (command_id, "PENDING", '{"sku": 8}', "NO_STOCK: none left", "ana", "refilled", '"old_data"'):
        assert piece in text

    db.execute("select commandbus.cancel_v1('shop', %s, 'ana', 'over')", [command_id])
    text = cli("show", park(details={"asked": 2, "traceback": "  File x\n    line y\n"})).stdout
    assert "traceback\n  |   File x\n  |     line y\n" in text
    assert 'error details\n  | {"asked": 2}\n' in text


def test_hostile_text_is_shown_and_not_obeyed(cli: CommandLine, park: Park) -> None:
    command_id = park(json.dumps({"text": HOSTILE}), message=HOSTILE, details={"traceback": HOSTILE})
    listing, showing = ["troubleshooting", "list", "shop"], ["show", command_id]
    views = (listing, showing, [*listing, "--json"], [*showing, "--json"])
    shown = [result.stdout for result in at_once(*(functools.partial(cli, *view) for view in views))]
    for text in shown:
        assert not re.search(r"[^\n -~\u00a1-\u2027\u2030-\uffff]", text)
        assert "[red]markup[/red]" in text
        assert not re.search(r"^second line", text, re.MULTILINE)
    for text in shown[:2]:
        assert r"\x1b[31mred\x1b[0m [red]markup[/red]\nsecond line\r\u202e\x9b31m :smile: \x7f" in text
    assert json.loads(shown[3])["command"]["error"]["message"] == HOSTILE


@pytest.mark.corrupts  # such numbers are put there past `send`
def test_numbers_that_json_cannot_write_do_not_spoil_the_document(cli: CommandLine, db: psycopg.Connection) -> None:
    command_id = cli.send("shop", "Buy")
    db.execute("update commandbus.command set data = %s", [f'{{"huge": {"9" * 400}.5, "small": 0.5}}'])
    assert command_id in cli("show", command_id).stdout

    def fail(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    found = json.loads(cli("show", command_id, "--json").stdout, parse_constant=fail)
    assert found["command"]["data"] == {"huge": "Infinity", "small": 0.5}


@pytest.mark.corrupts
def test_verify_prints_what_it_finds_and_ends_with_1(cli: CommandLine, db: psycopg.Connection) -> None:
    sound, broken = cli.send("shop", "Buy"), cli.send("shop", "Buy")
    assert cli("verify").stdout == "2 commands checked, 0 violations\n"
    assert cli.json("verify") == {"commands": 2, "violations": []}
    db.execute("update commandbus.command set attempts = 3 where command_id = %s", [broken])
    detail = "its attempts are 3, expected 0"
    found = cli("verify", code=1, quiet=True).stdout
    assert found == f"wrong_attempts  shop  {broken}  {detail}\n2 commands checked, 1 violation\n"
    assert sound not in found
    assert cli.json("verify", code=1, quiet=True) == {
        "commands": 2,
        "violations": [{"violation": "wrong_attempts", "domain": "shop", "command_id": broken, "detail": detail}],
    }


def test_verify_stops_when_its_time_is_over(cli: CommandLine, db: psycopg.Connection) -> None:
    with db.transaction():
        db.execute("LOCK TABLE commandbus.command_history")
        refused = cli("verify", "--timeout", "50ms", code=1).stderr
    assert "took longer than 0.05 s" in refused
    assert "Nothing was written" in refused


@pytest.mark.corrupts
def test_verify_counts_in_the_time_that_it_is_given(cli: CommandLine, db: psycopg.Connection) -> None:
    db.execute(
        "CREATE OR REPLACE FUNCTION commandbus.verify_v1() RETURNS TABLE (violation text, domain text, "
        "command_id uuid, detail text) LANGUAGE sql AS "
        "$$ SELECT 'time_left', 'shop', gen_random_uuid(), current_setting('statement_timeout') $$"
    )
    with ThreadPoolExecutor() as thread:
        with psycopg.connect(cli.dsn) as rival:
            rival.execute("LOCK TABLE commandbus.command_history")
            looking = thread.submit(cli.json, "verify", "--timeout", "1h", code=1, quiet=True)
            waiting = "SELECT 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query LIKE '%count(*)%'"
            eventually(lambda: db.execute(waiting).fetchall(), timeout=30, what="the count")
        (left,) = looking.result()["violations"]
    assert left["detail"].endswith("ms")  # less than an hour
