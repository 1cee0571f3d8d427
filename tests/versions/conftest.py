"""The client of 0.1.0, and databases with its schema."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from zipfile import ZipFile

import psycopg
import pytest

from commandbus.embedded import EmbeddedPostgres
from tests.support import assert_sound
from tests.versions.support import BOOKING, Crew, Version, run

_ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def old(tmp_path_factory: pytest.TempPathFactory) -> Version:
    """The client of 0.1.0: its wheel, built from the commit that CHANGELOG.md names."""
    folder = tmp_path_factory.mktemp("old")
    _unpack(_commit(), folder / "source")
    _pip("wheel", "--no-build-isolation", "--wheel-dir", str(folder), str(folder / "source"))
    (wheel,) = folder.glob("*.whl")
    _pip("install", "--target", str(folder / "client"), str(wheel))
    version = Version("0.1.0", folder / "client")
    print_version = "from importlib.metadata import version; import commandbus; print(version('commandbus'))"
    assert run(version, "-c", f"{print_version}; print(commandbus.__file__)").split() == [
        "0.1.0",
        str(folder / "client" / "commandbus" / "__init__.py"),
    ]
    return version


@pytest.fixture(scope="session")
def new() -> Version:
    """The client that is tested."""
    return Version("new", None)


@pytest.fixture(params=["old then new", "new then old"])
def versions(request: pytest.FixtureRequest, old: Version, new: Version) -> tuple[Version, Version]:
    """Both, in either order."""
    return (old, new) if request.param == "old then new" else (new, old)


@pytest.fixture
def crew(dsn: str, tmp_path: Path) -> Iterator[Crew]:
    """Starts processes of either version on a database with the new schema."""
    with psycopg.connect(dsn) as db:
        db.execute(BOOKING)
    with Crew(dsn, tmp_path) as crew:
        yield crew


@pytest.fixture
def old_dsn(request: pytest.FixtureRequest, empty_dsn: str, old: Version) -> Iterator[str]:
    """The DSN of a database with the schema of 0.1.0, in which `verify` finds nothing wrong after the test."""
    install(old, empty_dsn)
    yield empty_dsn
    with psycopg.connect(empty_dsn) as db:
        migrated = db.execute("SELECT to_regprocedure('commandbus.verify_v1()') IS NOT NULL").fetchone()
    if migrated == (True,):
        assert_sound(request, empty_dsn)


@pytest.fixture
def server_without_waits(tmp_path: Path) -> Iterator[EmbeddedPostgres]:
    """A server of this test's own. Its log tells, after the test, that nobody waited for a table or view for 2 s."""
    settings = {"fsync": "off", "full_page_writes": "off", "log_lock_waits": "on", "deadlock_timeout": "2s"}
    with EmbeddedPostgres(tmp_path / "data", settings=settings) as server:
        yield server
        (log,) = server.data_dir.glob("**/server.log")
        assert re.findall(r".* still waiting for \w+ on relation .*", log.read_text("utf-8")) == []


@pytest.fixture
def old_crew(server_without_waits: EmbeddedPostgres, old: Version, tmp_path: Path) -> Iterator[Crew]:
    """Starts processes of either version on a database of such a server, with the schema of 0.1.0."""
    dsn = server_without_waits.dsn()
    install(old, dsn)
    with psycopg.connect(dsn) as db:
        db.execute(BOOKING)
    with Crew(dsn, tmp_path) as crew:
        yield crew
    with psycopg.connect(dsn) as db:
        assert db.execute("SELECT * FROM commandbus.verify_v1()").fetchall() == []


def install(version: Version, dsn: str) -> None:
    """Migrate this database with that version."""
    run(version, "-c", "import sys; from commandbus.migrate import migrate; migrate(sys.argv[1])", dsn)


def _commit() -> str:
    changelog = (_ROOT / "CHANGELOG.md").read_text("utf-8")
    section = changelog.partition("\n## 0.1.0 ")[2]
    found = re.search(r"It is the commit `([0-9a-f]{40})`", section)
    assert found, "CHANGELOG.md does not name the commit of 0.1.0"
    return found[1]


def _unpack(commit: str, folder: Path) -> None:
    """Put the files of a commit there; fails with what to do where the clone does not have it."""
    archive = folder.with_suffix(".zip")
    git = ["git", "-c", f"safe.directory={_ROOT}", "-C", str(_ROOT), "archive", "--output", str(archive), commit]
    done = subprocess.run(git, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.fail(
            f"0.1.0 is the commit {commit}, which cannot be taken from {_ROOT}: {done.stderr.strip()}\n"
            "These tests need a clone with its history: in a shallow one, run `git fetch --unshallow`.",
            pytrace=False,
        )
    ZipFile(archive).extractall(folder)


def _pip(command: str, *arguments: str) -> None:
    pip = [sys.executable, "-I", "-m", "pip", "--disable-pip-version-check", "--no-input", command]
    done = subprocess.run([*pip, "--no-index", "--no-deps", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
