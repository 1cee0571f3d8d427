"""Runs the examples as a user would: the commands of their READMEs, in their folders, on a database of the test's own.

Each process has to end with the code that its user expects, and to have said nothing on stderr; of gunicorn's log and
the worker's, nothing may be worse than INFO.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest

from tests.acceptance.cli_support import Park
from tests.support import PYTEST, eventually

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"

# Used in the master before the fork, as by an application that looks at its queue when it is imported; and again when
# the processes that were forked have ended.
USED_BEFORE_THE_FORK = """
from app import app, bus
bus.count()

def on_exit(server):
    server.log.info("in the master: %d sent", bus.count())
"""


class Example:
    """An example's folder, from which its programs are started."""

    def __init__(self, name: str, dsn: str, logs: Path) -> None:
        self._folder = EXAMPLES / name
        self._logs = logs
        self._environment = (
            os.environ
            | PYTEST
            | {
                "COMMAND_BUS_DSN": dsn,
                "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
                "PYTHONDEVMODE": "1",
                "PYTHONDONTWRITEBYTECODE": "1",
                # Python 3.12 and newer warn of a fork where threads run, which is what is shown here.
                "PYTHONWARNINGS": "ignore:This process:DeprecationWarning",
                "PYTHONPATH": os.pathsep.join(filter(None, [str(logs), os.environ.get("PYTHONPATH")])),
            }
        )

    def run(self, *arguments: str, code: int = 0) -> str:
        """Run a program to its end, with this code, and return what it printed."""
        done = subprocess.run(
            arguments, cwd=self._folder, env=self._environment, capture_output=True, text=True, timeout=60, check=False
        )
        assert (done.returncode, done.stderr) == (code, ""), done
        return done.stdout

    @contextmanager
    def running(self, *arguments: str, told: Sequence[str] = ()) -> Iterator[Path]:
        """Run a program in the background, and stop it with SIGTERM. Gives the file with all that it says.

        `told`: the words of trouble in it.
        """
        log = self._logs / f"{arguments[0]}-{len(list(self._logs.iterdir()))}.log"
        with log.open("wb") as file, ExitStack() as stack:
            process = subprocess.Popen(
                arguments, cwd=self._folder, env=self._environment, stdin=subprocess.DEVNULL, stdout=file, stderr=file
            )
            stack.callback(process.wait)
            stack.callback(process.kill)
            yield log
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0, log.read_text()
        assert re.findall(r"Traceback|\bWARNING|\bERROR|\bCRITICAL|Warning:", log.read_text()) == [*told], (
            log.read_text()
        )

    @contextmanager
    def serving(self, *arguments: str) -> Iterator[tuple[int, Path]]:
        """Run gunicorn with these arguments; gives its port and its log."""
        with self.running("gunicorn", "--no-control-socket", "--bind", "127.0.0.1:0", *arguments) as log:
            listening = re.compile(r"(?<=Listening at: http://127\.0\.0\.1:)\d+")
            (found,) = eventually(lambda: listening.findall(log.read_text()), timeout=60, what="a web server")
            yield int(found), log


def request(port: int, method: str, path: str, data: object = None) -> tuple[int, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request(method, path, json.dumps(data), {"Content-Type": "application/json"})
        response = connection.getresponse()
        return response.status, json.load(response)
    finally:
        connection.close()


def statuses(db: psycopg.Connection) -> dict[str, int]:
    return dict(db.execute("select status, count(*) from commandbus.commands group by status").fetchall())


@pytest.mark.parametrize(
    "arguments",
    [
        ["--preload", "app:app"],
        ["--preload", "--config", "python:used_before_the_fork", "used_before_the_fork:app"],
        ["app:app"],
    ],
    ids=["preload", "used before the fork", "no preload"],
)
def test_flask_under_gunicorn(arguments: Sequence[str], dsn: str, db: psycopg.Connection, tmp_path: Path) -> None:
    (tmp_path / "used_before_the_fork.py").write_text(USED_BEFORE_THE_FORK)
    flask = Example("flask_app", dsn, tmp_path)

    def order(number: int) -> tuple[int, Any]:
        return request(port, "POST", "/orders", {"item": f"lamp {number}"})

    with flask.serving("-w", "4", "--threads", "8", *arguments) as (port, log):
        with ThreadPoolExecutor(32) as users:
            answers = list(users.map(order, range(400)))
        assert Counter(status for status, _ in answers) == {202: 400}
        sent = {answer["command_id"] for _, answer in answers}
        assert {str(row[0]) for row in db.execute("select command_id from commandbus.commands")} == sent

        with flask.running("python", "worker.py"):
            eventually(lambda: statuses(db) == {"COMPLETED": 400}, timeout=60, what="400 shipped orders")
        completed = {"status": "COMPLETED", "result": {"shipped": "lamp 7"}}
        assert request(port, "GET", f"/orders/{answers[7][1]['command_id']}") == (200, completed)
    used = "used_before_the_fork:app" in arguments
    assert ("in the master: 400 sent" in log.read_text()) is used


@pytest.mark.parametrize("example", ["flask_app", "ledger", "nightly_report"])
def test_the_examples_own_tests(example: str, dsn: str, tmp_path: Path) -> None:
    said = Example(example, dsn, tmp_path).run("python", "-m", "pytest", "-q", "-p", "no:cacheprovider")
    assert re.search(r"^\d+ passed in", said, re.MULTILINE), said


def test_the_nightly_report_waits_for_a_person(dsn: str, db: psycopg.Connection, tmp_path: Path) -> None:
    night = Example("nightly_report", dsn, tmp_path)
    night.run("python", "make_sales.py", "2026-01-05", "300")
    with night.running("python", "report.py", told=["ERROR"]):
        *_, last, advice = night.run("python", "nightly.py", "2026-01-05", "300", code=1).splitlines()
        assert last == "99.7% of 300 shops, 1 in trouble"

        db.execute("update nightly.sale set amount = '10.00' where amount = '1O.00'")
        night.run(*advice.partition(": ")[2].split(), "--operator", "ana", "--reason", "the letter O is a zero")
        *_, last, report = night.run("python", "nightly.py", "2026-01-05", "300").splitlines()
        assert last == "100.0% of 300 shops, 0 in trouble"
        assert report == "2026-01-05: 3750.00 from 300 shops, 0 missing"


def test_django(dsn: str, db: psycopg.Connection, tmp_path: Path) -> None:
    django = Example("django_project", dsn, tmp_path)
    django.run("python", "manage.py", "migrate", "--verbosity", "0")
    assert django.run("python", "manage.py", "makemigrations", "--check") == "No changes detected\n"
    db.execute("insert into shop_product (name, \"left\", shipped) values ('lamp', 30, 0)")

    with django.serving("-w", "2", "--threads", "4", "shop.wsgi") as (port, _):
        db.execute("listen commandbus")
        with ThreadPoolExecutor(8) as users:
            answers = list(users.map(lambda _: request(port, "POST", "/products/lamp/orders"), range(40)))
        assert Counter(status for status, _ in answers) == {202: 30, 409: 10}
        assert statuses(db) == {"PENDING": 30}  # those that were rolled back have left no command
        assert {hint.payload for hint in db.notifies(timeout=20, stop_after=1)} == {"shop"}  # of their commits

    with django.running("python", "manage.py", "runworker"):
        eventually(lambda: statuses(db) == {"COMPLETED": 30}, timeout=60, what="30 shipped lamps")
    assert db.execute('select "left", shipped from shop_product').fetchall() == [(0, 30)]


def test_the_script_sends_nothing_twice(dsn: str, db: psycopg.Connection, tmp_path: Path) -> None:
    script = Example("script", dsn, tmp_path)
    assert script.run("python", "import_orders.py", "orders.csv") == "3 orders sent, 0 were known\n"
    assert script.run("python", "import_orders.py", "orders.csv") == "0 orders sent, 3 were known\n"
    assert statuses(db) == {"PENDING": 3}


def test_the_tool_exits_at_once_with_its_command_sent(
    dsn: str, db: psycopg.Connection, park: Park, tmp_path: Path
) -> None:
    tool = Example("cli_tool", dsn, tmp_path)
    parked = park('{"item": "sofa"}')
    command_id = tool.run("python", "shop.py", "order", "lamp").strip()
    row = db.execute("select data from commandbus.commands where command_id = %s", [command_id]).fetchone()
    assert row == ({"item": "lamp"},)
    assert tool.run("python", "shop.py", "parked") == f"{parked} sofa NO_STOCK\n"
