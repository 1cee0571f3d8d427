"""The command line's `worker` and `dev`: processes that run until they are stopped."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import time
from pathlib import Path

import psycopg
import pytest

import commandbus
from commandbus.embedded import EmbeddedPostgres
from commandbus.migrate import migrate
from tests.acceptance.cli_support import CommandLine, execute, log_of, running, worker
from tests.support import eventually


def test_a_worker_handles_what_is_sent(cli: CommandLine, shop: Path) -> None:
    with worker(cli, shop, "--concurrency", "3", "--threads", "2", "--lease", "10", "--grace", "500ms") as process:
        assert "concurrency 3, threads 2" in log_of(shop)
        assert "domains shop, stock," in log_of(shop)
        command_id = cli.json("send", "shop", "Buy", '{"n": 1}')["command_id"]
        eventually(lambda: cli.status(command_id) == "COMPLETED", what="the command's end")
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    assert cli.json("show", command_id)["command"]["result"] == {"bought": {"n": 1}}
    assert (shop / "out").read_text() == ""


def test_a_blocking_handler_sends_what_comes_next(cli: CommandLine, shop: Path) -> None:
    with worker(cli, shop):
        first = cli.send("shop", "Relay", '{"n": 2}')
        eventually(lambda: cli.status(first) == "COMPLETED", what="the first one's end")
        second = cli.json("show", first)["command"]["result"]
        eventually(lambda: cli.status(second) == "COMPLETED", what="the end of what it sent")


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
        later_one = cli.json("send", "shop", "Buy")["command_id"]  # takes longer than a signal
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
        cli("send", "other", "Buy")  # takes longer than a signal
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
        ("no_such_module:registry", "no module no_such_module in "),
        ("shop_handlers.below:registry", "no module shop_handlers.below in "),
        ("needs:registry", "No module named 'not_installed' ("),
        ("shop_handlers:nothing", "nothing"),
        ("shop_handlers:not_a_registry", "is a int"),
        ("shop_handlers:empty", "has no handlers"),
        ("broken:registry", "ZeroDivisionError: division by zero"),
    ],
)
def test_a_registry_that_cannot_be_loaded_is_4(cli: CommandLine, shop: Path, place: str, says: str) -> None:
    (shop / "broken.py").write_text("1 / 0\n")
    (shop / "needs.py").write_text("import not_installed\n")
    result = cli("worker", place, code=4, cwd=shop)
    assert says in result.stderr
    module = place.partition(":")[0]
    assert (f"({shop / module}.py:1)" in result.stderr) == (module in {"broken", "needs"})
    assert (f" in {shop}, nor" in result.stderr) == ("no module" in says)
    assert "importlib" not in result.stderr
    assert str(Path(commandbus.__file__).parent) not in result.stderr


def test_an_outage_is_told_in_the_librarys_own_lines(shop: Path) -> None:
    with EmbeddedPostgres(shop / "data") as server:
        migrate(server.dsn("postgres"))
        with worker(CommandLine(server.dsn("postgres")), shop):
            server.stop()
            eventually(lambda: "again in 0.8 s" in log_of(shop), timeout=30, what="lines about the outage")
            time.sleep(2)  # in which the pool would complain several times
    assert "psycopg.pool" not in log_of(shop)


def test_a_domain_that_the_registry_does_not_have_is_4(cli: CommandLine, shop: Path) -> None:
    result = cli("worker", "shop_handlers:registry", "--domain", "nope", code=4, cwd=shop)
    assert '"nope"' in result.stderr


def test_neither_password_nor_payload_reach_the_log(cli: CommandLine, shop: Path) -> None:
    """The server trusts its socket: a password in the DSN is accepted, whatever it is."""
    cli = CommandLine(f"{cli.dsn} password=canary-of-the-dsn")
    data = '{"canary-of-the-payload": "canary-of-the-payload\\n"}'
    with worker(cli, shop, "--log-level", "debug") as process:
        ids = [cli.send("shop", command_type, data) for command_type in ("Buy", "Refuse")]
        ids.append(cli.send("shop", "Crash", data, max_attempts=1))
        eventually(lambda: all(cli.look("attempts", i) == 1 for i in ids), what="an attempt of each")
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    assert all(command_id in log_of(shop) for command_id in ids[1:])
    assert "canary" not in log_of(shop)
    result = cli("send", "shop", "Buy", '{"note": "canary\\u0000"}', code=2)
    assert "data.note has a NUL character" in result.stderr
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
        command_id = CommandLine(dsn).json("send", "shop", "Buy")["command_id"]
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
