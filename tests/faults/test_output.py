"""What the command line and the log show of hostile payloads: nothing that steers a terminal or forges a line."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from commandbus.cli.terminal import JsonLines, TextLines
from tests.faults.payloads import CASES, DOMAIN, GOOD_VALUES, WORDS, Case, fits
from tests.faults.stage import EACH, LONG, SAMPLE, Stage, fuzzed
from tests.support import async_only
from tests.worker.support import PARKED


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
    before = logger.level
    logger.setLevel(logging.DEBUG)
    yield written
    logger.setLevel(before)
    for handler in handlers:
        logger.removeHandler(handler)


def assert_harmless(shown: str) -> None:
    """Each line is printable: no control character but the end of a line."""
    for line in shown.split("\n"):
        assert line.isprintable(), line


@async_only("the command line has a bus of its own", pooled=False)
@pytest.mark.parametrize("examples", [SAMPLE // 5, pytest.param(LONG // 5, marks=pytest.mark.long)])
def test_no_control_character_reaches_a_terminal_or_a_log(  # noqa: PLR0917
    lines: dict[str, io.StringIO],  # before the stage: the worker logs as it starts
    stage: Stage,
    show: Callable[..., str],
    dsn: str,
    examples: int,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    levels = set()

    @fuzzed(request.config, examples)
    @given(st.lists(CASES, min_size=EACH, max_size=EACH), st.booleans(), WORDS, GOOD_VALUES.filter(fits))
    def look(cases: list[Case], terminal: bool, word: str, value: object) -> None:  # noqa: FBT001 - Hypothesis gives it
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
            assert_harmless(show(dsn, *arguments, terminal=terminal))
            if not terminal and arguments[0] in {"list", "show"}:
                json.loads(show(dsn, *arguments, "--json"))
        levels.update(check_log(lines))

    look()
    assert {"INFO", "WARNING"} <= levels


def check_log(lines: dict[str, io.StringIO]) -> set[str]:
    """One record, one line, in both formats; returns the levels of those that were seen."""
    text, documents = (lines[name].getvalue() for name in ("text", "json"))
    assert_harmless(text)
    assert documents.isascii()
    records = [json.loads(line) for line in documents.splitlines()]
    assert not any("traceback" in record for record in records)
    assert len(records) == text.count("\n")
    for stream in lines.values():
        stream.seek(0)
        stream.truncate()
    return {record["level"] for record in records}
