"""What every command line has, as a process: help, exit codes, one line for wrong usage."""

from __future__ import annotations

import os
import subprocess
import sys
import uuid
from collections.abc import Iterator

import psycopg
import pytest
from psycopg import sql

from commandbus.embedded import EmbeddedPostgres
from tests.acceptance.cli_support import CommandLine, execute


@pytest.fixture(scope="module")
def cli(server: EmbeddedPostgres, template: str) -> Iterator[CommandLine]:
    """With one database for all: wrong usage changes nothing in it."""
    with psycopg.connect(server.dsn("postgres"), autocommit=True) as admin:
        admin.execute(sql.SQL("create database wrong_usage template {}").format(sql.Identifier(template)))
        yield CommandLine(server.dsn("wrong_usage"))
        admin.execute("drop database wrong_usage with (force)")


def test_version() -> None:
    result = execute("--version")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith("commandbus")


@pytest.mark.parametrize(
    "command",
    [
        [], ["migrate"], ["worker"], ["send"], ["show"], ["list"], ["stats"], ["workers"], ["doctor"], ["verify"],
        ["demo"], ["dev"], ["troubleshooting"],
        ["troubleshooting", "list"], ["troubleshooting", "retry"], ["troubleshooting", "cancel"],
        ["troubleshooting", "complete"], ["troubleshooting", "groups"], ["troubleshooting", "show"],
        ["troubleshooting", "edit"],
        ["batch"], ["batch", "list"], ["batch", "show"], ["batch", "watch"], ["batch", "cancel"], ["batch", "retry"],
        ["process"], ["process", "list"], ["process", "show"], ["process", "timeline"], ["process", "retry"],
        ["process", "cancel"], ["process", "resume"],
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
        (["send", "shop", "Buy", "NaN"], "DATA: is not JSON: NaN is no number of JSON"),
        (["send", "shop", "Buy", '{"n": [1, -Infinity]}'], "-Infinity is no number of JSON"),
        (["send", "shop", "Buy", '{"a": {"b c": ["canary\\ud800"]}}'], 'data.a["b c"][0] has a lone surrogate'),
        (["send", "shop", "Buy", "[" * 65 + "]" * 65], "is nested deeper than 64 levels"),
        (["send", "shop", "Buy", "9" * 4301], "is not JSON"),
        (["send", "shop", "Buy", "--header", f"canary={'x' * 8192}"], "headers has 8,20"),
        (["send", "shop", "Buy", "--correlation-id", "x" * 257], "at most 256 characters"),
        (["send", "\x1b[31m", "Buy"], r"\x1b[31m"),
        (["send", "shop", "Buy", "--header", "a=canary\udcff"], "argument 5 is not UTF-8"),
        (["list", "--type", "\udcff"], "argument 3 is not UTF-8"),
        (["troubleshooting", "cancel", "shop", "--operator", "\udcff", "--reason", "r", "--count", "0"], "not UTF-8"),
        (["troubleshooting", "groups", "shop", "--text", "\udcff"], "argument 5 is not UTF-8"),
        (["show", "nope"], "UUID"),
        (["migrate", "--check", "--print"], "--check"),
        (["list", "--status", "lost"], "--status"),
        (["list", "--since", "yesterday"], "is not a duration"),
        (["list", "--follow", "--cursor", "x"], "--follow"),
        (["list", "--cursor", "nope"], "cursor"),
        (["worker", "no_colon"], "MODULE:REGISTRY"),
        (["worker", "payments.py:registry"], "try payments:registry"),
        (["worker", "./shop/payments.py:registry"], "try shop.payments:registry"),
        (["troubleshooting", "list", "bad domain!"], "domain is 'bad domain!'"),
        (["worker", "a:b", "--lease", "0.5x"], "is not a duration"),
        (["troubleshooting", "list", "shop", "--limit", "0"], "limit"),
        (["troubleshooting", "list", "shop", "--cursor", "nope"], "cursor"),
        (["troubleshooting", "cancel", "shop", str(uuid.uuid4())], "--reason"),
        (["troubleshooting", "retry", "shop", str(uuid.uuid4()), "--data", "null"], "null"),
        (["troubleshooting", "retry", "shop", str(uuid.uuid4()), str(uuid.uuid4()), "--data", "1"], "one ID"),
        (["troubleshooting", "retry", "shop", str(uuid.uuid4()), "--data", "{canary"], "is not JSON"),
        (
            ["troubleshooting", "retry", "shop", str(uuid.uuid4()), "--data", '"canary\\u0000"'],
            "data has a NUL character",
        ),
        (
            ["troubleshooting", "complete", "shop", str(uuid.uuid4()), "--reason", "x", "--result", "[NaN]"],
            "--result: is not JSON",
        ),
        (["troubleshooting", "retry", "shop", "--data", "1"], "one ID"),
        (["troubleshooting", "retry", "shop", "--patch", "null"], "null"),
        (["troubleshooting", "retry", "shop", str(uuid.uuid4()), "--patch", "{}"], "goes without IDs"),
        (["troubleshooting", "retry", "shop"], "--dry-run instead of it tells the number"),
        (["troubleshooting", "cancel", "shop", "--type", "Buy", "--reason", "r"], "--count"),
        (["troubleshooting", "retry", "shop", "--count", "-1"], "--count"),
        (["troubleshooting", "retry", "shop", "--count", "1", "--rate", "0"], "--rate"),
        (["troubleshooting", "retry", "shop", str(uuid.uuid4()), "--type", "Buy"], "IDs go without"),
        (["troubleshooting", "retry", "shop", str(uuid.uuid4()), "--dry-run"], "IDs go without"),
        (["troubleshooting", "retry", "shop", str(uuid.uuid4()), "--count", "1"], "IDs go without"),
        (["troubleshooting", "retry", "shop", str(uuid.uuid4()), "--rate", "1"], "IDs go without"),
        (["troubleshooting", "groups", "shop", "--parked-for", "soon"], "is not a duration"),
        (["troubleshooting", "groups", "shop", "--parked-for", "9999d"], "parked_for is"),
        (["troubleshooting", "edit", "shop", str(uuid.uuid4()), "--data", "1", "--patch", "1"], "--patch"),
        (["troubleshooting", "edit", "shop", str(uuid.uuid4()), "--data", "{canary"], "is not JSON"),
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
