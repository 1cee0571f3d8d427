"""What the command line shows: lines, records, JSON and log records.

Text that comes from outside (the database, an exception, an argument) is never interpreted: neither by the terminal,
nor as Rich's markup, nor as the end of a line.
"""

from __future__ import annotations

import dataclasses
import io
import json
import logging
import shutil
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, date, datetime, timedelta
from typing import TypeVar

import typer
from rich.console import Console
from rich.text import Text

from commandbus._failures import printable
from commandbus.model import Error, Json, Page

T = TypeVar("T")

_NARROWEST = 20  # what is narrower is left to the terminal to fold
_LOG_KEYS = ("domain", "command_type", "command_id", "delivery", "attempt", "worker")


def prepare() -> None:
    """Let the standard streams escape what their encoding does not have, and log nothing below an error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    log_to_stderr("ERROR", TextLines())


def safe(value: object) -> str:
    """Return the text of a value for a place inside a line: what is not printable comes out as in a Python literal."""
    return printable(str(value))


def say(line: str) -> None:
    """Print one line for people."""
    typer.echo(safe(line))


def complain(message: str) -> None:
    """Print what went wrong as one line on stderr."""
    typer.echo(f"commandbus: {safe(' '.join(message.split()))}", err=True)


def remark(line: str) -> None:
    """Print how far something is as one line on stderr."""
    typer.echo(safe(line), err=True)


# -- JSON --------------------------------------------------------------------------------------------------------------


def print_json(value: Json) -> None:
    """Print a value, of which dataclasses may be a part, as one line of ASCII."""
    try:
        text = json.dumps(value, default=_plain, allow_nan=False)
    except ValueError:
        # PostgreSQL stores numbers of 400 digits and a fraction, which are infinite in Python and nothing in JSON.
        text = json.dumps(json.loads(json.dumps(value, default=_plain), parse_constant=str))
    typer.echo(text)


def _plain(value: object) -> Json:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return fields(value)
    return value.isoformat() if isinstance(value, date) else str(value)


def fields(value: object) -> dict[str, Json]:
    """Return the fields of a dataclass by name; not `asdict`, which copies payloads, level by level."""
    names = [field.name for field in dataclasses.fields(value)]  # type: ignore[arg-type]
    return {name: getattr(value, name) for name in names}


# -- text for people ---------------------------------------------------------------------------------------------------


def print_record(record: Mapping[str, object]) -> None:
    """Print each field that has a value."""
    width = max(map(len, record)) + 2
    for name, value in record.items():
        if value is not None:
            _print_folded(name.ljust(width), _cell(value), " " * width)


def print_entries(title: str, entries: Iterable[tuple[Sequence[object], Sequence[object]]]) -> None:
    """Print entries under a title."""
    say(title)
    for head, below in entries:
        print_entry(head, below)


def print_entry(head: Sequence[object], below: Sequence[object] = ()) -> None:
    """Print an entry: a line of values, and below it a line for each value that needs room."""
    _print_folded("  ", "  ".join(_cell(value) for value in head if value is not None), "    ")
    for value in below:
        if value is not None:
            _print_folded("    ", _cell(value), "    ")


def print_page(
    page: Page[T],
    entry: Callable[[T], tuple[Sequence[object], Sequence[object]]],
    nothing: str,
    *,
    title: str | None = None,
    as_json: bool,
) -> None:
    """Print a page of entries, and the way to the next; of an empty one, these words."""
    if as_json:
        print_json(page)
        return
    if not page.items:
        say(nothing)
    elif title is not None:
        say(title)
    for item in page:
        print_entry(*entry(item))
    if page.next_cursor:
        say(f"there are more: --cursor {page.next_cursor}")


def start_screen() -> None:
    """Clear the terminal for what is drawn anew; elsewhere, what was printed stays."""
    if sys.stdout.isatty():
        typer.echo("\x1b[H\x1b[2J", nl=False)


def print_quoted(title: str, text: str) -> None:
    """Print a text of several lines, each of them marked so that none can pass for a line of ours."""
    say(title)
    for line in text.splitlines():
        _print_folded("  | ", safe(line), "  | ")


def named(name: str, value: object) -> str | None:
    """Return a value with its name, for a line of several; None stays None."""
    return None if value is None else f"{name}={_cell(value)}"


def age(seconds: float) -> str:
    """Return a length of time in its largest unit, as the arguments take it: 12s, 5m, 3h, 2d."""
    for unit, length in (("d", 86_400), ("h", 3_600), ("m", 60)):
        if seconds >= length:
            return f"{seconds // length:.0f}{unit}"
    return f"{max(seconds, 0):.0f}s"


def json_cell(value: Json) -> str | None:
    """Return a JSON value as its text, for a cell; None stays None."""
    return None if value is None else json.dumps(value, ensure_ascii=False)


def _print_folded(first: str, text: str, indent: str) -> None:
    """Print a text that begins with `first`; on a terminal folded to its width, the other lines after `indent`."""
    lines = [text]
    if sys.stdout.isatty():
        width = max(shutil.get_terminal_size().columns - len(indent), _NARROWEST)
        lines = [line.plain for line in Text(text).wrap(Console(), width, overflow="fold")] or lines
    for number, line in enumerate(lines):
        typer.echo(f"{indent if number else first}{line}")


def _cell(value: object) -> str:
    match value:
        case datetime():
            return f"{value.astimezone(UTC):%Y-%m-%dT%H:%M:%SZ}"
        case timedelta():
            return age(value.total_seconds())
        case Error():
            return safe(f"{value.code}: {value.message}" if value.message else value.code)
        case _:
            return safe(value)


# -- logs --------------------------------------------------------------------------------------------------------------


def log_to_stderr(level: str, lines: logging.Formatter) -> None:
    """Send the log records of all libraries from this level on to stderr, and nowhere else."""
    handler = logging.StreamHandler()
    handler.setFormatter(lines)
    logging.basicConfig(level=level, handlers=[handler], force=True)
    # While the server is down it warns several times a second of what our own lines say, more and more rarely.
    logging.getLogger("psycopg.pool").setLevel(logging.ERROR)


class TextLines(logging.Formatter):
    """Log records as lines of text."""

    def format(self, record: logging.LogRecord) -> str:
        """Return a line; a traceback follows, each line of it marked so that none can pass for a record."""
        extra = "".join(f" {key}={safe(value)}" for key, value in _extra(record).items())
        line = f"{_moment(record)} {record.levelname} {safe(record.name)}: {safe(record.getMessage())}{extra}"
        return "\n    | ".join([line, *(safe(part) for part in _traceback(record).splitlines())])


class JsonLines(logging.Formatter):
    """Log records as JSON objects, one a line."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the time, level, logger, message, what names the delivery, and perhaps a traceback."""
        line = {
            "time": _moment(record),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **_extra(record),
        }
        if record.exc_info:
            line["traceback"] = _traceback(record)
        return json.dumps(line, default=str)


def _extra(record: logging.LogRecord) -> dict[str, Json]:
    return {key: record.__dict__[key] for key in _LOG_KEYS if key in record.__dict__}


def _traceback(record: logging.LogRecord) -> str:
    return "".join(traceback.format_exception(*record.exc_info)) if record.exc_info else ""


def _moment(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
