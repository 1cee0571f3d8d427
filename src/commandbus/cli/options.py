"""What the subcommands have in common in their arguments: the options, and how they are read."""

from __future__ import annotations

import dataclasses
import functools
import getpass
import inspect
import json
import os
import re
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any, TypeAlias, TypeVar

import typer

from commandbus._calls import _NAME as NAME
from commandbus.cli import terminal
from commandbus.errors import ConfigurationError
from commandbus.model import Json

Dsn: TypeAlias = Annotated[
    str | None,
    typer.Option(
        envvar="COMMAND_BUS_DSN",
        metavar="DSN",
        help="The database, as libpq understands it. Better set the variable: everybody on this machine can see the "
        "arguments of a program (`ps`), and with them a password.",
    ),
]
AsJson: TypeAlias = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
DataDir: TypeAlias = Annotated[
    Path | None,
    typer.Option(help="The server's folder. Default: $COMMAND_BUS_DATA_DIR, else `commandbus` in your data folder."),
]


def _possible_domain(value: str) -> str:
    if NAME.fullmatch(value) is None:
        raise typer.BadParameter(f"domain is {value!r}: it must be 1 to 128 of letters, digits and _ . : -")
    return value


Domain: TypeAlias = Annotated[str, typer.Argument(metavar="DOMAIN", callback=_possible_domain)]


def _user_name() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        raise ConfigurationError(f"user {os.getuid()} of this machine has no name: give --operator") from None


Operator: TypeAlias = Annotated[
    str,
    typer.Option(
        default_factory=_user_name,
        show_default=False,
        help="Who acts; the audit trail keeps it. Default: your name on this machine.",
    ),
]
Reason: TypeAlias = Annotated[str, typer.Option(help="Why; the audit trail keeps it.")]
OptionalReason: TypeAlias = Annotated[str | None, typer.Option(help="Why; the audit trail keeps it.")]

Limit: TypeAlias = Annotated[int, typer.Option(min=1, max=1000)]
Cursor: TypeAlias = Annotated[str | None, typer.Option(help="The `next_cursor` of the page before.")]

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, slots=True)
class Acting:
    """The options of an operator's verb on one thing."""

    operator: Operator
    dsn: Dsn = None
    as_json: AsJson = False

    def tell(self, done: object, line: str) -> None:
        """Print what was done, as JSON or as this line."""
        terminal.print_json(done) if self.as_json else terminal.say(line)


def spread(subcommand: Callable[..., T]) -> Callable[..., T]:
    """Give a subcommand the fields of each parameter that is a dataclass as options, which typer cannot do itself."""
    taken = inspect.signature(subcommand, eval_str=True).parameters
    groups: dict[str, Any] = {name: p.annotation for name, p in taken.items() if dataclasses.is_dataclass(p.annotation)}

    @functools.wraps(subcommand)
    def run(**given: object) -> T:
        for name, group in groups.items():
            given[name] = group(**{field.name: given.pop(field.name) for field in dataclasses.fields(group)})
        return subcommand(**given)

    shown = [p for name, p in taken.items() if name not in groups]
    for group in groups.values():
        shown += inspect.signature(group, eval_str=True).parameters.values()
    run.__signature__ = inspect.Signature([p.replace(kind=p.KEYWORD_ONLY) for p in shown])  # type: ignore[attr-defined]
    return run


_UNITS = {"ms": "milliseconds", "": "seconds", "s": "seconds", "m": "minutes", "h": "hours", "d": "days"}


def read_json(name: str, text: str) -> Json:
    """Return the value of JSON text, of `@file`, or of stdin for `-`."""
    return _read(name, text, _parse)


def read_data(name: str, text: str) -> str:
    """Return the text itself, with all its digits, if it is JSON that can be a command's data."""
    return _read(name, text, check_data)


def check_data(text: str) -> str:
    """Return the text if it is JSON that can be a command's data. Raises `ValueError`, `RecursionError`."""
    if _parse(text) is None:
        raise ValueError("null cannot be a command's data")
    return text


def _parse(text: str) -> Json:
    return json.loads(text, parse_constant=_refuse)


def _read(name: str, text: str, read: Callable[[str], T]) -> T:
    try:
        if text == "-":
            text = sys.stdin.read()
        elif text.startswith("@"):
            text = Path(text[1:]).read_text(encoding="utf-8")
        return read(text)
    except OSError as error:
        raise typer.BadParameter(f"cannot be read: {error.strerror}", param_hint=name) from None
    except (ValueError, RecursionError) as error:
        raise typer.BadParameter(f"is not JSON: {error}", param_hint=name) from None


def _refuse(constant: str) -> Json:
    raise ValueError(f"{constant} is no number of JSON")


def duration(name: str, text: str) -> timedelta:
    """Return the value of `90`, in seconds, or of `500ms`, `90s`, `5m`, `1h`, `2d`."""
    found = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)(ms|s|m|h|d|)", text, re.ASCII)
    if found is None:
        raise typer.BadParameter(f"{text} is not a duration such as 90, 500ms, 90s, 5m, 1h or 2d", param_hint=name)
    return timedelta(**{_UNITS[found[2]]: float(found[1])})
