"""What the command line and the log show of hostile payloads: nothing that steers a terminal or forges a line."""

from __future__ import annotations

import io
import json
import logging
import sys
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from commandbus import CommandBus, Worker, cli  # noqa: F401 - `route` looks for the two by name
from commandbus.cli.terminal import JsonLines, TextLines
from tests.bus.support import Connection
from tests.faults.payloads import CASES, DOMAIN, GOOD_VALUES, WORDS, Case, fits
from tests.faults.test_payloads import LONG, SAMPLE, Stage, fuzzed
from tests.support import Route, async_only
from tests.worker.support import PARKED

EACH = 20
Show = Callable[..., str]
directly = async_only("the command line has a bus of its own", pooled=False)


class Screen(io.StringIO):
    """Takes what is shown, as a terminal does or as a file."""

    def __init__(self, *, terminal: bool) -> None:
        super().__init__()
        self._terminal = terminal

    def isatty(self) -> bool:
        return self._terminal


@pytest.fixture
def show(dsn: str, monkeypatch: pytest.MonkeyPatch) -> Show:
    """Run a command line in this process, and return what it prints: `show(terminal, "list")`."""
    monkeypatch.setenv("COMMAND_BUS_DSN", dsn)
    monkeypatch.setenv("COLUMNS", "40")

    def show(terminal: bool, *arguments: str) -> str:  # noqa: FBT001 - Hypothesis gives it
        with monkeypatch.context() as patch:
            screen = Screen(terminal=terminal)
            patch.setattr(sys, "argv", ["commandbus", *arguments])
            patch.setattr(sys, "stdout", screen)
            patch.setattr(sys, "stderr", screen)
            patch.setattr(logging.root, "handlers", [])  # the command line puts its own there
            cli.main()
            return screen.getvalue()

    return show


@pytest.fixture
def lines() -> Iterator[dict[str, io.StringIO]]:
    """The log of the library from DEBUG on, as `commandbus worker` writes it, by the format."""
    logger, written = logging.getLogger("commandbus"), {}
    handlers = []
    for name, formatter in (("text", TextLines()), ("json", JsonLines())):
        written[name] = io.StringIO()
        handlers.append(logging.StreamHandler(written[name]))
        handlers[-1].setFormatter(formatter)
        logger.addHandler(handlers[-1])
    before, logger.level = logger.level, logging.DEBUG
    yield written
    logger.setLevel(before)
    for handler in handlers:
        logger.removeHandler(handler)


@pytest.fixture
def stage(route: Route, db: Connection) -> Iterator[Stage]:
    stage = Stage(route, db)
    with stage.runner:
        stage.runner.run(stage.start())
        yield stage
        stage.runner.run(stage.end())


def assert_harmless(shown: str) -> None:
    """Each line is printable: no control character but the end of a line."""
    for line in shown.split("\n"):
        assert line.isprintable(), line


@directly
@pytest.mark.parametrize("examples", [SAMPLE // 5, pytest.param(LONG // 5, marks=pytest.mark.long)])
def test_no_control_character_reaches_a_terminal_or_a_log(
    stage: Stage, show: Show, lines: dict[str, io.StringIO], examples: int
) -> None:
    @settings(fuzzed, max_examples=examples)
    @given(st.lists(CASES, min_size=EACH, max_size=EACH), st.booleans(), WORDS, GOOD_VALUES.filter(fits))
    def look(cases: list[Case], terminal: bool, word: str, value: object) -> None:  # noqa: FBT001 - as above
        before = len(stage.seen)
        commands = stage.runner.run(stage.play(cases, as_batch=True))
        assert len(stage.seen) > before
        some = commands[0].command_id
        parked = [str(command.command_id) for command in commands if command.status == PARKED]
        for arguments in (
            ["list", "--limit", "30"],
            ["show", str(some)],
            ["troubleshooting", "list", DOMAIN],
            ["troubleshooting", "groups", DOMAIN],
            ["troubleshooting", "list", DOMAIN, "--text", word, "--type", word],
            *(["troubleshooting", "show", command_id] for command_id in parked[:1]),
            *(
                ["troubleshooting", "edit", DOMAIN, command_id, "--data", json.dumps(value), "--reason", word]
                for command_id in parked[:1]
            ),
            *(["show", command_id] for command_id in parked[:1]),
            ["troubleshooting", "cancel", DOMAIN, *parked[1:], "--reason", word],
            ["stats"],
            ["verify"],
        ):
            assert_harmless(show(terminal, *arguments))
            if not terminal and arguments[0] in {"list", "show"}:
                json.loads(show(terminal, *arguments, "--json"))
        check_log(lines)

    look()


def check_log(lines: dict[str, io.StringIO]) -> None:
    """One record, one line, in both formats."""
    text, documents = (lines[name].getvalue() for name in ("text", "json"))
    assert_harmless(text)
    assert documents.isascii()
    records = [json.loads(line) for line in documents.splitlines()]
    assert not any("traceback" in record for record in records)
    assert len(records) == text.count("\n")
    for stream in lines.values():
        stream.seek(0)
        stream.truncate()
