"""The command line, as a process: what it prints, what it exits with, and what it never says."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import psycopg
import pytest

import commandbus
from commandbus import _calls
from commandbus._calls import Call
from commandbus._database import execute_on
from commandbus.embedded import EmbeddedPostgres
from commandbus.model import Json
from tests.support import eventually

T = TypeVar("T")
Result = subprocess.CompletedProcess[str]

SHOP = """
import logging, sys, time
from pathlib import Path
from commandbus import HandlerRegistry, PermanentCommandError

registry = HandlerRegistry()
not_a_registry = 42
empty = HandlerRegistry()

@registry.handler("shop", "Buy")
def buy(command, context):
    return {"bought": command.data}

@registry.handler("shop", "Slow")
def slow(command, context):
    Path("started").touch()
    while not Path("go").exists():
        time.sleep(0.01)
    return "slow, but done"

@registry.handler("shop", "Refuse")
async def refuse(command, context):
    raise PermanentCommandError("NO_STOCK", "none left", {"asked": command.data})

@registry.handler("shop", "Crash")
def crash(command, context):
    raise ValueError(f"cannot work with {command.data}")

@registry.handler("stock", "Log")
def log(command, context):
    try:
        raise ValueError("first\\n2026-01-01 INFO forged: line")
    except ValueError:
        logging.getLogger("shop").exception("evil \\x1b[31m\\n2026-01-01 INFO forged: line", extra={"domain": "d\\x1b"})
"""

HOSTILE = "\x1b[31mred\x1b[0m [red]markup[/red]\nsecond line\r\u202e\x9b31m :smile: \x7f"


def execute(
    *arguments: str | Path,
    dsn: str | None = None,
    stdin: str = "",
    env: Mapping[str, str] | None = None,
    **options: Any,
) -> Result:
    return subprocess.run(
        [sys.executable, "-m", "commandbus", *map(str, arguments)],
        input=stdin, capture_output=True, text=True, timeout=60, env=environment(dsn, env), check=False, **options,
    )  # fmt: skip


def environment(dsn: str | None, env: Mapping[str, str] | None = None) -> dict[str, str]:
    given = {} if dsn is None else {"COMMAND_BUS_DSN": dsn}
    library = str(Path(commandbus.__file__).parents[1])  # also where a relative PYTHONPATH does not lead there
    return {**os.environ, "COLUMNS": "250", "PYTHONPATH": library, **given, **(env or {})}


@contextmanager
def running(*arguments: str | Path, dsn: str | None = None, folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Start the command line in `folder`; what it writes goes to the files `out` and `err` there."""
    with (folder / "out").open("w") as out, (folder / "err").open("w") as err:
        process = subprocess.Popen(
            [sys.executable, "-m", "commandbus", *map(str, arguments)],
            stdin=subprocess.DEVNULL, stdout=out, stderr=err, text=True, cwd=folder, env=environment(dsn),
        )  # fmt: skip
    try:
        yield process
    finally:
        process.kill()
        process.wait()


class CommandLine:
    """The command line with the DSN of the test's database in its environment."""

    def __init__(self, dsn: str) -> None:
        self.dsn = dsn

    def __call__(self, *arguments: str | Path, code: int = 0, quiet: bool = False, **options: Any) -> Result:
        result = execute(*arguments, dsn=self.dsn, **options)
        assert result.returncode == code, result
        assert "Traceback" not in result.stderr
        if code and not quiet:
            assert re.fullmatch(r"(commandbus: .+\n)+", result.stderr), result.stderr
        else:
            assert result.stderr == ""
        return result

    def json(self, *arguments: str | Path, **options: Any) -> Json:
        result = self(*arguments, "--json", **options)
        assert result.stdout.isascii()
        assert result.stdout.count("\n") == 1, "one document, one line"
        return json.loads(result.stdout)

    def send(self, *arguments: str) -> str:
        return str(self.json("send", *arguments)["command_id"])

    def status(self, command_id: str) -> str:
        return str(self.json("show", command_id)["command"]["status"])


@pytest.fixture
def cli(dsn: str) -> CommandLine:
    return CommandLine(dsn)


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    (tmp_path / "shop_handlers.py").write_text(SHOP)
    return tmp_path


Park = Callable[..., str]


@pytest.fixture
def park(cli: CommandLine, db: psycopg.Connection) -> Park:
    """Send a command and park it, as a worker would; returns its id."""

    def run(call: Call[T]) -> T:
        return asyncio.run(execute_on(db, call))

    def park(data: str = "{}", *, message: str = "none left", code: str = "NO_STOCK", details: object = None) -> str:
        command_id = cli.send("shop", "Buy", data)
        (claimed,) = run(
            _calls.claim("shop", [("Buy", -1, _calls.LAST_PLACE)], 1, "tester", timedelta(seconds=60))
        ).commands
        error = json.dumps({"code": code, "message": message, "details": details})
        more = f',"kind":"PERMANENT","error":{error},"retry_in":0,"max_attempts":4'
        run(_calls.fail("shop", [_calls.held(claimed.command_id, claimed.delivery, claimed.lease_token, more)]))
        assert str(claimed.command_id) == command_id
        return command_id

    return park


# -- what every command line has ---------------------------------------------------------------------------------------


def test_version() -> None:
    result = execute("--version")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith("commandbus")


@pytest.mark.parametrize(
    "command",
    [
        [], ["migrate"], ["worker"], ["send"], ["show"], ["demo"], ["dev"], ["troubleshooting"],
        ["troubleshooting", "list"], ["troubleshooting", "retry"], ["troubleshooting", "cancel"],
        ["troubleshooting", "complete"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_help_explains_the_exit_codes(command: list[str]) -> None:
    result = execute(*command, "--help", dsn="host=canary password=canary")
    assert (result.returncode, result.stderr) == (0, "")
    text = " ".join(result.stdout.split())
    for code in ("0 done", "1 it failed", "2 wrong usage", "3 the database", "4 the configuration", "130 interrupted"):
        assert code in text
    assert "canary" not in text
    if "--dsn" in text:
        assert "`ps`" in text


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "Missing command"),
        (["frobnicate"], "frobnicate"),
        (["send", "shop", "Buy", "--nope"], "--nope"),
        (["send", "shop"], "TYPE"),
        (["send", "shop", "Buy", "{canary"], "is not JSON"),
        (["send", "shop", "Buy", "@/does/not/exist"], "cannot be read"),
        (["send", "shop", "Buy", "--id", "nope"], "UUID"),
        (["send", "shop", "Buy", "--delay", "soon"], "is not a duration"),
        (["send", "shop", "Buy", "--header", "novalue"], "KEY=VALUE"),
        (["send", "shop", "Buy", "--priority", "101"], "--priority"),
        (["send", "sh op", "Buy"], "domain is 'sh op'"),
        (["send", "shop", "Buy", "NaN"], "JSON"),
        (["send", "\x1b[31m", "Buy"], r"\x1b[31m"),
        (["show", "nope"], "UUID"),
        (["migrate", "--check", "--print"], "--check"),
        (["worker", "no_colon"], "MODULE:REGISTRY"),
        (["worker", "a:b", "--lease", "0.5x"], "is not a duration"),
        (["troubleshooting", "list", "shop", "--limit", "0"], "limit"),
        (["troubleshooting", "list", "shop", "--cursor", "nope"], "cursor"),
        (["troubleshooting", "cancel", "shop", str(uuid.uuid4())], "--reason"),
        (["troubleshooting", "retry", "shop", str(uuid.uuid4()), "--data", "null"], "null"),
        (["troubleshooting", "retry", "shop", str(uuid.uuid4()), str(uuid.uuid4()), "--data", "1"], "one ID"),
        (["troubleshooting", "retry", "shop", str(uuid.uuid4()), "--data", "{canary"], "is not JSON"),
    ],
)
def test_wrong_usage_is_2(cli: CommandLine, arguments: list[str], says: str) -> None:
    result = cli(*arguments, code=2)
    assert result.stdout == ""
    assert says in result.stderr
    assert result.stderr.count("\n") == 1
    assert "canary" not in result.stderr


def test_a_closed_pipe_ends_it_quietly() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as closed:
        result = subprocess.run(
            [sys.executable, "-m", "commandbus", "migrate", "--print"],
            stdout=closed, stderr=subprocess.PIPE, text=True, timeout=60, check=False,
        )  # fmt: skip
    assert (result.returncode, result.stderr) == (1, "")


@pytest.mark.parametrize("absent", ["typer", "rich"])
def test_without_the_extra_it_names_the_extra(absent: str) -> None:
    program = f"""
import sys
class Absent:
    def find_spec(self, name, *_):
        if name.partition(".")[0] == {absent!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Absent())
from commandbus.cli import main
sys.exit(main())
"""
    result = subprocess.run([sys.executable, "-c", program, "--help"], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (4, "")
    assert result.stderr == "commandbus: the command line needs an extra: pip install 'commandbus[cli]'\n"


# -- the database ------------------------------------------------------------------------------------------------------

EVERY_COMMAND_WITH_A_DATABASE = [
    ["migrate"],
    ["migrate", "--check"],
    ["send", "shop", "Buy"],
    ["show", str(uuid.uuid4())],
    ["troubleshooting", "list", "shop"],
    ["troubleshooting", "retry", "shop", str(uuid.uuid4())],
    ["troubleshooting", "cancel", "shop", str(uuid.uuid4()), "--reason", "r"],
    ["troubleshooting", "complete", "shop", str(uuid.uuid4()), "--reason", "r"],
]


@pytest.mark.parametrize("command", EVERY_COMMAND_WITH_A_DATABASE, ids=" ".join)
def test_an_unreachable_database_is_3_and_no_dsn_is_4(command: list[str]) -> None:
    nowhere = "postgresql://ana:canary@localhost:1/shop"
    for result in (execute(*command, dsn=nowhere), execute(*command, "--dsn", nowhere)):
        assert (result.returncode, result.stdout) == (3, "")
        assert re.fullmatch(r"commandbus: .*\bport 1\b.*\n", result.stderr)
        assert "canary" not in result.stderr
    result = execute(*command)
    assert (result.returncode, result.stdout) == (4, "")
    assert result.stderr == "commandbus: no DSN: set COMMAND_BUS_DSN, or give --dsn\n"


@pytest.mark.parametrize("command", EVERY_COMMAND_WITH_A_DATABASE[2:], ids=" ".join)
def test_a_database_without_the_schema_is_3(empty_dsn: str, command: list[str]) -> None:
    result = execute(*command, dsn=empty_dsn)
    assert (result.returncode, result.stdout) == (3, "")
    assert re.fullmatch(r"commandbus: .*`commandbus migrate`.*\n", result.stderr)


def test_a_worker_without_database_schema_or_dsn(empty_dsn: str, shop: Path) -> None:
    command = ["worker", "shop_handlers:registry"]
    result = execute(*command, dsn=empty_dsn, cwd=shop)
    assert result.returncode == 3
    assert "`commandbus migrate`" in result.stderr
    result = execute(*command, cwd=shop)
    assert (result.returncode, result.stderr.count("\n")) == (4, 1)
    result = execute(*command, dsn="postgresql://ana:canary@localhost:1/shop", cwd=shop)  # it tries for 10 s
    assert result.returncode == 3
    assert "no connection to PostgreSQL" in result.stderr
    assert "canary" not in result.stderr


@pytest.mark.parametrize(
    "dsn",
    [
        "password=can ary host=localhost",
        "postgresql://ana:can@ary@localhost:1/shop",
        "postgresql://ana:can/ary@localhost:1/shop",
        "postgresql://ana:1/ary@localhost:1/shop",
        "nonsense can ary",
    ],
)
def test_of_a_dsn_that_cannot_be_read_nothing_is_told(dsn: str) -> None:
    for command in (["migrate"], ["send", "shop", "Buy"], ["worker", "a:b"]):
        result = execute(*command, dsn=dsn)
        assert (result.returncode, result.stdout) == (4, "")
        assert re.fullmatch(r"commandbus: the DSN .*\n", result.stderr)
        assert not re.search(r"can(?!not)|ary", result.stderr)


def test_ctrl_c_is_130_and_says_what_is_known_of_the_send(
    cli: CommandLine, db: psycopg.Connection, connect: Callable[[], psycopg.Connection], tmp_path: Path
) -> None:
    with connect() as blocker:
        blocker.execute("lock table commandbus.command in access exclusive mode")
        with running("send", "shop", "Buy", dsn=cli.dsn, folder=tmp_path) as process:
            waiting = "select query from pg_locks l join pg_stat_activity a using (pid) where not l.granted"
            eventually(lambda: "send_v1" in str(db.execute(waiting).fetchall()), what="a send that waits")
            process.send_signal(signal.SIGINT)
            assert process.wait(30) == 130
    said = (tmp_path / "err").read_text()
    assert re.fullmatch(r"commandbus: interrupted: command [0-9a-f-]{36} may have been sent\n", said)


def test_migrate(empty_dsn: str) -> None:
    cli = CommandLine(empty_dsn)
    assert cli("migrate", "--check", code=1, quiet=True).stdout.startswith("to apply: 0001_")
    pending = cli.json("migrate", "--check", code=1, quiet=True)["pending"]
    assert pending[0].startswith("0001_")
    assert cli("migrate").stdout == f"applied: {', '.join(pending)}\n"
    assert cli("migrate").stdout == "the schema is up to date\n"
    assert cli.json("migrate") == {"applied": []}
    assert cli("migrate", "--check").stdout == "the schema is up to date\n"
    assert cli.json("migrate", "--check") == {"pending": []}


def test_migrate_tells_what_it_applied_as_json(empty_dsn: str) -> None:
    assert CommandLine(empty_dsn).json("migrate")["applied"][0].startswith("0001_")


def test_migrate_print_needs_no_database_and_its_script_does_the_same(empty_dsn: str) -> None:
    printed = execute("migrate", "--print")
    assert (printed.returncode, printed.stderr) == (0, "")
    assert json.loads(execute("migrate", "--print", "--json").stdout)["sql"].strip() == printed.stdout.strip()
    with psycopg.connect(empty_dsn) as connection:
        connection.execute(printed.stdout.encode())
    assert CommandLine(empty_dsn)("migrate", "--check").returncode == 0


# -- send and show -----------------------------------------------------------------------------------------------------


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
    assert cli.json("show", cli.send("shop", "Buy"))["command"]["data"] == {}


def test_a_command_in_several_domains_wants_one_named(cli: CommandLine) -> None:
    command_id = str(uuid.uuid4())
    unknown = cli("show", command_id, code=1)
    assert unknown.stderr == f"commandbus: no command {command_id} in any domain\n"
    for domain in ("b", "a", "c"):
        cli.send(domain, "Other")
    cli.send("b", "Buy", "--id", command_id)
    assert cli.json("show", command_id)["command"]["domain"] == "b"
    cli.send("c", "Buy", "--id", command_id)
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
    assert list(found) == ["command", "audit_trail"]
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


# -- the troubleshooting queue -----------------------------------------------------------------------------------------


def test_list(cli: CommandLine, park: Park) -> None:
    assert cli("troubleshooting", "list", "shop").stdout == "nothing is parked here\n"
    assert cli.json("troubleshooting", "list", "shop") == {"items": [], "next_cursor": None}
    first, second, third = park(), park(), park(code="LATE")
    text = cli("troubleshooting", "list", "shop").stdout
    assert text.index(first) < text.index(second) < text.index(third)
    assert "NO_STOCK: none left" in text
    page = cli.json("troubleshooting", "list", "shop", "--limit", "2")
    assert [item["command_id"] for item in page["items"]] == [first, second]
    assert page["items"][0]["error"] == {"code": "NO_STOCK", "message": "none left", "details": None}
    rest = cli.json("troubleshooting", "list", "shop", "--limit", "2", "--cursor", page["next_cursor"])
    assert [item["command_id"] for item in rest["items"]] == [third]
    assert f"--cursor {page['next_cursor']}" in cli("troubleshooting", "list", "shop", "--limit", "2").stdout
    assert cli.json("troubleshooting", "list", "shop", "--type", "Other")["items"] == []
    assert len(cli.json("troubleshooting", "list", "shop", "--type", "Buy")["items"]) == 3


def test_retry_with_edited_data(cli: CommandLine, park: Park, tmp_path: Path) -> None:
    command_id = park('{"n": 1}')
    (tmp_path / "new.json").write_text('{"n": 2}')
    done = cli(
        "troubleshooting", "retry", "shop", command_id, "--data", f"@{tmp_path / 'new.json'}", "--operator", "ana"
    )
    assert done.stdout == f"retried {command_id}\n"
    command = cli.json("show", command_id)["command"]
    assert (command["status"], command["data"]) == ("PENDING", {"n": 2})


def test_retry_of_several_keeps_their_data(cli: CommandLine, park: Park) -> None:
    ids = [park('{"n": 1}'), park('{"n": 2}')]
    assert cli("troubleshooting", "retry", "shop", *ids).stdout == "".join(f"retried {i}\n" for i in ids)
    assert [cli.json("show", i)["command"]["data"] for i in ids] == [{"n": 1}, {"n": 2}]


def test_cancel_and_complete(cli: CommandLine, park: Park) -> None:
    given_up, done_by_hand = park(), park()
    result = cli.json("troubleshooting", "cancel", "shop", given_up, "--reason", "gone", env={"LOGNAME": "maria"})
    assert result == {"domain": "shop", "command_id": given_up, "outcome": "canceled", "message": None}
    found = cli.json("show", given_up)
    assert found["command"]["status"] == "CANCELED"
    assert (found["audit_trail"][-1]["operator"], found["audit_trail"][-1]["reason"]) == ("maria", "gone")

    options = ["--reason", "by hand", "--operator", "ana", "--result", '{"by": "hand"}']
    assert cli.json("troubleshooting", "complete", "shop", done_by_hand, *options)["outcome"] == "completed"
    command = cli.json("show", done_by_hand)["command"]
    assert (command["status"], command["result"]) == ("COMPLETED", {"by": "hand"})


def test_one_that_cannot_be_acted_on_holds_up_no_other(cli: CommandLine, park: Park) -> None:
    pending, unknown, parked = cli.send("other", "Buy"), str(uuid.uuid4()), park()
    result = cli("troubleshooting", "cancel", "shop", unknown, parked, "--reason", "r", "--json", code=1)
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert [(line["command_id"], line["outcome"]) for line in lines] == [(unknown, "refused"), (parked, "canceled")]
    assert unknown in lines[0]["message"]
    assert result.stderr.count("\n") == 1
    assert unknown in result.stderr
    refused = cli("troubleshooting", "retry", "other", pending, code=1)
    assert f"command {pending} is PENDING: cannot retry it" in refused.stderr


def test_of_two_rivals_one_wins_and_the_other_is_told(cli: CommandLine, park: Park) -> None:
    command_id = park()
    rivals = [
        subprocess.Popen(
            [sys.executable, "-m", "commandbus", "troubleshooting", *action, "shop", command_id, "--reason", "r"],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(cli.dsn),
        )
        for action in (["cancel"], ["complete"])
    ]  # fmt: skip
    said = [(*rival.communicate(timeout=60), rival.returncode) for rival in rivals]
    (winner, loser) = sorted(said, key=lambda each: each[2])
    assert (winner[1:], loser[0], loser[2]) == (("", 0), "", 1)
    assert re.fullmatch(rf"commandbus: command {command_id} is (CANCELED|COMPLETED): cannot \w+ it.*\n", loser[1])


def test_the_operator_needs_a_name(cli: CommandLine, park: Park) -> None:
    command_id = park()
    assert "operator" in cli("troubleshooting", "retry", "shop", command_id, "--operator", "", code=2).stderr
    assert cli.status(command_id) == "IN_TROUBLESHOOTING_QUEUE"


def test_hostile_text_is_shown_and_not_obeyed(cli: CommandLine, park: Park) -> None:
    command_id = park(json.dumps({"text": HOSTILE}), message=HOSTILE, details={"traceback": HOSTILE})
    shown = [
        cli("troubleshooting", "list", "shop").stdout,
        cli("show", command_id).stdout,
        cli("troubleshooting", "list", "shop", "--json").stdout,
        cli("show", command_id, "--json").stdout,
    ]
    for text in shown:
        assert not re.search(r"[^\n -~\u00a1-\u2027\u2030-\uffff]", text)
        assert "[red]markup[/red]" in text
        assert not re.search(r"^second line", text, re.MULTILINE)
    for text in shown[:2]:
        assert r"\x1b[31mred\x1b[0m [red]markup[/red]\nsecond line\r\u202e\x9b31m :smile: \x7f" in text
    assert json.loads(shown[3])["command"]["error"]["message"] == HOSTILE


def test_numbers_that_json_cannot_write_do_not_spoil_the_document(cli: CommandLine, db: psycopg.Connection) -> None:
    command_id = cli.send("shop", "Buy")
    db.execute("update commandbus.command set data = %s", [f'{{"huge": {"9" * 400}.5, "small": 0.5}}'])
    assert command_id in cli("show", command_id).stdout

    def fail(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    found = json.loads(cli("show", command_id, "--json").stdout, parse_constant=fail)
    assert found["command"]["data"] == {"huge": "Infinity", "small": 0.5}


# -- the worker --------------------------------------------------------------------------------------------------------


def log_of(folder: Path) -> str:
    return (folder / "err").read_text()


@contextmanager
def worker(cli: CommandLine, folder: Path, *options: str) -> Iterator[subprocess.Popen[str]]:
    with running("worker", "shop_handlers:registry", *options, dsn=cli.dsn, folder=folder) as process:
        eventually(lambda: "starts" in log_of(folder), timeout=30, what="the worker's start")
        yield process


def test_a_worker_handles_what_is_sent(cli: CommandLine, shop: Path) -> None:
    with worker(cli, shop, "--concurrency", "3", "--threads", "2", "--lease", "10", "--grace", "500ms") as process:
        assert "concurrency 3, threads 2" in log_of(shop)
        assert "domains shop, stock," in log_of(shop)
        command_id = cli.send("shop", "Buy", '{"n": 1}')
        eventually(lambda: cli.status(command_id) == "COMPLETED", what="the command's end")
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    assert cli.json("show", command_id)["command"]["result"] == {"bought": {"n": 1}}
    assert (shop / "out").read_text() == ""


def test_a_worker_of_one_domain_leaves_the_other(cli: CommandLine, shop: Path) -> None:
    other = cli.send("stock", "Log")
    with worker(cli, shop, "--domain", "shop"):
        command_id = cli.send("shop", "Buy")
        eventually(lambda: cli.status(command_id) == "COMPLETED", what="the command's end")
    assert cli.status(other) == "PENDING"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_the_running_handler_finish(cli: CommandLine, shop: Path, number: int) -> None:
    with worker(cli, shop) as process:
        running_one = cli.send("shop", "Slow")
        eventually((shop / "started").exists, what="the handler's start")
        process.send_signal(number)
        later_one = cli.send("shop", "Buy")  # takes longer than a signal
        assert process.poll() is None
        (shop / "go").touch()
        assert process.wait(30) == 0
    assert cli.json("show", running_one)["command"]["result"] == "slow, but done"
    assert cli.status(later_one) == "PENDING"
    assert "Traceback" not in log_of(shop)


def test_a_second_signal_ends_the_grace(cli: CommandLine, shop: Path) -> None:
    with worker(cli, shop) as process:
        command_id = cli.send("shop", "Slow")
        eventually((shop / "started").exists, what="the handler's start")
        process.send_signal(signal.SIGTERM)
        cli.send("other", "Buy")  # takes longer than a signal
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    assert cli.status(command_id) == "PENDING"


def test_json_log_lines_name_the_delivery(cli: CommandLine, shop: Path) -> None:
    command_id = cli.send("shop", "Refuse")
    with worker(cli, shop, "--log-format", "json", "--log-level", "debug") as process:
        eventually(lambda: command_id in log_of(shop), what="a line about the command")
        process.send_signal(signal.SIGTERM)
        process.wait(30)
    lines = [json.loads(line) for line in log_of(shop).splitlines()]
    (line,) = [line for line in lines if line.get("command_id") == command_id]
    assert {"time", "level", "logger", "message"} < set(line)
    assert (line["domain"], line["command_type"], line["delivery"], line["attempt"]) == ("shop", "Refuse", 1, 1)
    assert line["worker"]


def test_text_log_lines_cannot_be_forged(cli: CommandLine, shop: Path) -> None:
    command_id = cli.send("stock", "Log")
    with worker(cli, shop, "--log-level", "info"):
        eventually(lambda: cli.status(command_id) == "COMPLETED", what="the command's end")
        log = log_of(shop)
    assert r"ERROR shop: evil \x1b[31m\n2026-01-01 INFO forged: line domain=d\x1b" in log
    assert "    | ValueError: first\n    | 2026-01-01 INFO forged: line\n" in log
    for line in log.splitlines():
        assert re.match(r"\d{4}-\d\d-\d\dT[\d:.]+\+00:00 [A-Z]+ [\w.]+: |    \| ", line), line
    assert "\x1b" not in log


def test_json_log_lines_cannot_be_forged(cli: CommandLine, shop: Path) -> None:
    cli.send("stock", "Log")
    with worker(cli, shop, "--log-format", "json"):
        eventually(lambda: "evil" in log_of(shop), what="the handler's line")
        lines = [json.loads(line) for line in log_of(shop).splitlines()]
    (line,) = [line for line in lines if line["logger"] == "shop"]
    assert line["message"] == "evil \x1b[31m\n2026-01-01 INFO forged: line"
    assert "ValueError: first" in line["traceback"]
    assert "\x1b" not in log_of(shop)


def test_a_less_talkative_worker(cli: CommandLine, shop: Path) -> None:
    command_id = cli.send("shop", "Buy")
    with running("worker", "shop_handlers:registry", "--log-level", "warning", dsn=cli.dsn, folder=shop) as process:
        eventually(lambda: cli.status(command_id) == "COMPLETED", what="the command's end")
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    assert log_of(shop) == ""


@pytest.mark.parametrize(
    ("place", "says"),
    [
        ("no_such_module:registry", "No module named"),
        ("shop_handlers:nothing", "nothing"),
        ("shop_handlers:not_a_registry", "is a int"),
        ("shop_handlers:empty", "has no handlers"),
        ("broken:registry", "ZeroDivisionError: division by zero"),
    ],
)
def test_a_registry_that_cannot_be_loaded_is_4(cli: CommandLine, shop: Path, place: str, says: str) -> None:
    (shop / "broken.py").write_text("1 / 0\n")
    result = cli("worker", place, code=4, cwd=shop)
    assert says in result.stderr
    if place.startswith("broken"):
        assert f"({shop / 'broken.py'}:1)" in result.stderr


def test_a_domain_that_the_registry_does_not_have_is_4(cli: CommandLine, shop: Path) -> None:
    result = cli("worker", "shop_handlers:registry", "--domain", "nope", code=4, cwd=shop)
    assert '"nope"' in result.stderr


def test_neither_password_nor_payload_reach_the_log(cli: CommandLine, shop: Path) -> None:
    """The server trusts its socket: a password in the DSN is accepted, whatever it is."""
    cli = CommandLine(f"{cli.dsn} password=canary-of-the-dsn")
    data = '{"canary-of-the-payload": "canary-of-the-payload\\n"}'
    with worker(cli, shop, "--log-level", "debug") as process:
        ids = [cli.send("shop", command_type, data) for command_type in ("Buy", "Refuse")]
        ids.append(cli.send("shop", "Crash", data, "--max-attempts", "1"))
        eventually(lambda: all(cli.json("show", i)["command"]["attempts"] == 1 for i in ids), what="an attempt of each")
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    assert all(command_id in log_of(shop) for command_id in ids[1:])
    assert "canary" not in log_of(shop)
    result = cli("send", "shop", "Buy", '{"canary": "\\u0000"}', code=2)
    assert "canary" not in result.stderr


# -- dev ---------------------------------------------------------------------------------------------------------------


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize(("number", "options"), [(signal.SIGTERM, ["--json"]), (signal.SIGINT, [])])
def test_dev_runs_until_it_is_stopped(tmp_path: Path, number: int, options: list[str]) -> None:
    with running("dev", "--data-dir", tmp_path / "data", *options, folder=tmp_path) as process:
        eventually(lambda: "dbname=commandbus" in (tmp_path / "out").read_text(), timeout=60, what="a DSN")
        said = (tmp_path / "out").read_text()
        if options:
            found = json.loads(said)
            assert found["data_dir"] == str(tmp_path / "data")
            dsn = str(found["dsn"])
        else:
            (assignment,) = [line for line in said.splitlines() if line.startswith("export ")]
            name, _, dsn = shlex.split(assignment)[1].partition("=")
            assert name == "COMMAND_BUS_DSN"
        command_id = CommandLine(dsn).send("shop", "Buy")
        with psycopg.connect(dsn) as connection:
            row = connection.execute("select setting from pg_settings where name = 'data_directory'").fetchone()
        assert row is not None
        server = int(Path(row[0], "postmaster.pid").read_text().splitlines()[0])
        process.send_signal(number)
        assert process.wait(60) == 0
    assert (tmp_path / "err").read_text() == ""
    eventually(lambda: not is_alive(server), what="the end of the server")
    with EmbeddedPostgres(tmp_path / "data") as again:  # and what was sent is kept
        assert CommandLine(again.dsn("commandbus")).status(command_id) == "PENDING"


def test_dev_without_a_postgresql_is_4(tmp_path: Path) -> None:
    result = execute("dev", "--data-dir", tmp_path, env={"COMMAND_BUS_PG_BIN": "/nowhere"})
    assert (result.returncode, result.stdout) == (4, "")
    assert re.fullmatch(r"commandbus: COMMAND_BUS_PG_BIN is /nowhere.*\n", result.stderr)
