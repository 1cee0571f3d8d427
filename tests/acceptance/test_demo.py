"""The demo as a user runs it, and its proof, which has to notice what is wrong."""

from __future__ import annotations

import asyncio
import io
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg import sql

from commandbus import CommandBus, CommandStatus, HandlerRegistry, Worker, demo
from commandbus.demo import example
from commandbus.embedded import EmbeddedPostgres
from tests.acceptance.embedded_support import needs_proc
from tests.support import aeventually, eventually

KEYS = ["sent", "completed", "failed", "parked", "retried", "taken_over", "balanced"]
SMALL = "import sys, pathlib, commandbus.demo as d; a = map(pathlib.Path, sys.argv[1:]); "
SMALL += "sys.exit(d.run(json_output=True, data_dir=next(a), transfers=next(a)))"
AT_REST = (CommandStatus.IN_TROUBLESHOOTING_QUEUE,)


def make(folder: Path, count: int, *, misspelt: int = 1, malformed: int = 1, uncovered: int = 3) -> Path:
    """Write small files like those of the example."""
    script = runpy.run_path(str(example() / "make_transfers.py"))
    script["make"].__globals__.update(MISSPELT=misspelt, MALFORMED=malformed, UNCOVERED=uncovered)
    script["write"](folder, *script["make"](count))
    return folder


def program(name: str, *arguments: str, dsn: str = "") -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "COMMAND_BUS_DSN": dsn}
    command = [sys.executable, str(example() / name), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)


def figures(stdout: str) -> dict[str, Any]:
    """Read the one line of JSON, which has to be all there is."""
    (line,) = stdout.splitlines()
    found: dict[str, Any] = json.loads(line)
    assert list(found) == KEYS
    return found


@pytest.fixture
def mark(monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[str]]:
    """Mark what is started from now on, and return a function that finds it among all processes."""
    name = f"DEMO_TEST_{uuid.uuid4().hex}"
    monkeypatch.setenv(name, "1")

    def living() -> list[str]:
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            try:
                if name.encode() in (process / "environ").read_bytes() and process.name != str(os.getpid()):
                    found.append((process / "cmdline").read_bytes().replace(b"\0", b" ").decode())
            except OSError:
                continue  # it ended meanwhile, or is somebody else's
        return found

    return living


# -- the files ---------------------------------------------------------------------------------------------------------


def test_the_script_makes_the_files_that_are_committed(tmp_path: Path) -> None:
    assert program("make_transfers.py", str(tmp_path)).returncode == 0
    for name in ("accounts.csv", "transfers.csv"):
        assert (tmp_path / name).read_bytes() == (example() / name).read_bytes()
    assert (tmp_path / "transfers.csv").read_bytes().count(b"\n") == 10_001


# -- the proof ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def booked(server: EmbeddedPostgres, template: str) -> Iterator[tuple[str, Path]]:
    """A database in which the bus has booked a small file, and the file's folder."""
    name = "ledger_booked"
    with (
        tempfile.TemporaryDirectory(prefix="commandbus-") as folder,
        psycopg.connect(server.dsn(), autocommit=True) as admin,
    ):
        make(Path(folder), 60)
        create(admin, name, template)
        dsn = server.dsn(name)
        assert program("load.py", folder, dsn=dsn).stdout.startswith("60 of 60 ")
        assert program("load.py", folder, dsn=dsn).stdout.startswith("0 of 60 ")
        asyncio.run(work(dsn))
        repaired = program("repair.py", dsn=dsn)
        assert repaired.returncode == 0, repaired.stderr
        asyncio.run(work(dsn))
        eventually(lambda: not sessions(admin, name), what="the end of the sessions")
        yield name, Path(folder)
        admin.execute(f"drop database {name} with (force)")


def create(admin: psycopg.Connection, name: str, template: str) -> None:
    admin.execute(sql.SQL("create database {} template {}").format(sql.Identifier(name), sql.Identifier(template)))


def sessions(admin: psycopg.Connection, name: str) -> list[Any]:
    return admin.execute("select pid from pg_stat_activity where datname = %s", [name]).fetchall()


async def work(dsn: str) -> None:
    """Run the example's handler until nothing is left to do."""
    registry: HandlerRegistry = runpy.run_path(str(example() / "ledger.py"))["registry"]

    async def at_rest() -> bool:
        return all(stat.status in AT_REST for stat in await bus.stats())

    async with CommandBus(dsn) as bus:
        worker = Worker(bus, "ledger", registry)
        working = asyncio.create_task(worker.run())
        await aeventually(at_rest, timeout=30)
        worker.stop()
        await working


@pytest.fixture
def copy(server: EmbeddedPostgres, booked: tuple[str, Path]) -> Iterator[str]:
    """The DSN of a copy of that database, to be spoilt."""
    name = "ledger_copy"
    with psycopg.connect(server.dsn(), autocommit=True) as admin:
        create(admin, name, booked[0])
        yield server.dsn(name)
        admin.execute(f"drop database {name} with (force)")


def test_the_proof_holds_for_what_the_bus_has_booked(copy: str, booked: tuple[str, Path]) -> None:
    proof = program("proof.py", copy, str(booked[1]))
    assert (proof.returncode, proof.stderr) == (0, "")
    assert proof.stdout.startswith("of 60 transfers in the file 57 are covered; 114 entries sum to 0;")
    assert proof.stdout.endswith("balanced to the cent, and no transfer booked twice\n")


FIRST = "(select min(transfer_id) from ledger.entry)"
AGAIN = f"select transfer_id, account_id, cents from ledger.entry where transfer_id = {FIRST}"
FROM_FIRST = f"from ({AGAIN}) e where e.account_id = a.account_id"
INTO = "insert into ledger.entry (transfer_id, account_id, cents)"


@pytest.mark.parametrize(
    ("spoil", "found"),
    [
        pytest.param([f"{INTO} {AGAIN}"], " is booked twice", id="doubled, balances as before"),
        pytest.param(
            [
                f"update ledger.account a set balance_cents = balance_cents + cents {FROM_FIRST}",
                f"{INTO} {AGAIN}",
            ],
            " is booked twice",
            id="doubled, and the balances with it",
        ),
        pytest.param([f"{INTO} {AGAIN} limit 1"], " is booked as ", id="one entry doubled"),
        pytest.param([f"delete from ledger.entry where transfer_id = {FIRST}"], " is booked as nothing", id="missing"),
        pytest.param(
            ["delete from ledger.entry where entry_id = (select min(entry_id) from ledger.entry)"],
            " is booked as ",
            id="one entry missing",
        ),
        pytest.param(
            [f"update ledger.entry set cents = cents + sign(cents) where transfer_id = {FIRST}"],
            " is booked as ",
            id="a cent more on both sides",
        ),
        pytest.param(
            ["update ledger.account set balance_cents = balance_cents + 1 where account_id = 'ACC-007'"],
            "ACC-007 holds ",
            id="a cent more in an account",
        ),
        pytest.param(
            ["update ledger.account set opening_cents = opening_cents + 1 where account_id = 'ACC-007'"],
            "not those of the file",
            id="a cent more at the opening",
        ),
        pytest.param(
            [f"{INTO} values ('T99999', 'ACC-001', -5), ('T99999', 'ACC-002', 5)"],
            "T99999 is booked and not in the file",
            id="invented",
        ),
    ],
)
def test_the_proof_notices(copy: str, booked: tuple[str, Path], spoil: list[str], found: str) -> None:
    with psycopg.connect(copy) as connection:
        for statement in spoil:
            assert connection.execute(statement.encode()).rowcount > 0
    proof = program("proof.py", copy, str(booked[1]))
    assert proof.returncode == 1
    assert found in proof.stdout
    assert "balanced to the cent" not in proof.stdout


# -- the demo ----------------------------------------------------------------------------------------------------------


@needs_proc
@pytest.mark.timeout(300)  # 25 s on two free cores
def test_the_demo_ends_with_its_figures_and_leaves_no_process(mark: Callable[[], list[str]]) -> None:
    command = [sys.executable, "-m", "commandbus", "demo", "--json"]
    demo = subprocess.run(command, capture_output=True, text=True, check=False, timeout=280)
    assert demo.returncode == 0, demo.stderr
    found = figures(demo.stdout)
    assert found.pop("taken_over") > 0
    assert list(found.values()) == [10_000, 9_980, 20, 20, 20, True]
    assert mark() == []


@pytest.mark.timeout(200)
def test_the_demo_starts_anew_each_time(tmp_path: Path) -> None:
    """Also on the folder of a server that stays. An environment that leads elsewhere is not looked at."""
    make(tmp_path, 1_000)
    environment = {**os.environ, "COMMAND_BUS_DSN": "host=/nowhere", "COMMAND_BUS_DATA_DIR": "/nowhere"}
    with tempfile.TemporaryDirectory(prefix="commandbus-") as data_dir:
        for _ in range(2):
            command = [sys.executable, "-c", SMALL, data_dir, str(tmp_path)]
            demo = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=90)
            assert demo.returncode == 0, demo.stderr
            found = figures(demo.stdout)
            assert found.pop("taken_over") > 0
            assert list(found.values()) == [1_000, 997, 3, 2, 2, True]
        with EmbeddedPostgres(data_dir) as server, psycopg.connect(server.dsn()) as connection:
            names = connection.execute("select datname from pg_database where not datistemplate").fetchall()
    assert names == [("postgres",)]


@needs_proc
@pytest.mark.timeout(200)
def test_what_the_operator_cannot_explain_fails_the_demo(tmp_path: Path, mark: Callable[[], list[str]]) -> None:
    make(tmp_path, 1_000, misspelt=0, malformed=0)
    file = tmp_path / "transfers.csv"
    lines = file.read_text("ascii").splitlines()
    lines[500] = "T00500,ACC-998,ACC-999,1200"
    file.write_text("\n".join(lines) + "\n", "ascii")
    with tempfile.TemporaryDirectory(prefix="commandbus-") as data_dir:
        command = [sys.executable, "-c", SMALL, data_dir, str(tmp_path)]
        demo = subprocess.run(command, capture_output=True, text=True, check=False, timeout=90)
    assert demo.returncode == 1
    assert figures(demo.stdout)["balanced"] is False
    assert "repair.py: nobody knows what was meant by " in demo.stderr
    assert "FAILED: repair.py ended with 1" in demo.stderr
    assert mark() == []


@pytest.mark.corrupts
def test_a_violation_is_said_and_fails_the_demo(dsn: str, db: psycopg.Connection, tmp_path: Path) -> None:
    said = io.StringIO()
    play = demo._Demo(dsn, tmp_path, tmp_path / "log", demo._Screen(said), demo._Figures())
    play._connection = db
    db.execute("""select commandbus.send_v1('[{"domain": "ledger", "command_type": "Transfer"}]')""")
    play._verify()
    db.execute("update commandbus.command set crashes = 1")
    with pytest.raises(demo._UnexplainedError, match=r"verify found 1 violations, the first: .*wrong_crashes"):
        play._verify()
    assert [line.split("  ")[-1] for line in said.getvalue().splitlines()] == [
        f"verify: {count} violations in all that the bus has kept" for count in (0, 1)
    ]


@needs_proc
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_demo_leaves_no_process(number: signal.Signals, mark: Callable[[], list[str]]) -> None:
    command = [sys.executable, "-m", "commandbus", "demo", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as demo:
        assert demo.stderr is not None
        for line in demo.stderr:
            if "COMPLETED" in line:
                break
        assert mark() != []
        demo.send_signal(number)
        output, errors = demo.communicate(timeout=60)
    assert demo.returncode == 130
    assert "interrupted" in errors
    assert "Traceback" not in errors
    assert figures(output)["balanced"] is False
    assert mark() == []
