"""The command line: runs one subcommand, and turns however it ends into an exit code and at most one line on stderr.

Nothing in this file needs the `cli` extra, so that it can be missed in one clear line; all beside it does.
"""

from __future__ import annotations

import sys

import psycopg

from commandbus.cli.database import StoppedError
from commandbus.errors import (
    CommandBusError,
    ConfigurationError,
    DatabaseUnavailableError,
    InvalidCommandError,
    SchemaError,
    SendTimeoutError,
)

DONE, REPORTED, USAGE, DATABASE, CONFIGURATION, INTERRUPTED = 0, 1, 2, 3, 4, 130
"""The exit codes, as the help explains them."""


def main() -> int:
    """Run what `sys.argv` says; returns the exit code. What is an error of ours passes, with its traceback."""
    try:
        from commandbus.cli import app, terminal  # noqa: PLC0415 - these need the extra
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in {"typer", "rich"}:
            raise
        sys.stderr.write("commandbus: the command line needs an extra: pip install 'commandbus[cli]'\n")
        return CONFIGURATION
    terminal.prepare()
    try:
        return app.run()
    except app.UsageError as error:
        hint = f" (see `{error.ctx.command_path} --help`)" if error.ctx else ""
        code, message = USAGE, f"{error.format_message().rstrip('.')}{hint}"
    except CommandBusError as error:
        code, message = _code(error), _with_notes(str(error), error)
    except psycopg.Error as error:
        # Not str(error): what stands below its first line may quote a payload.
        code, message = _code(error), _with_notes(error.diag.message_primary or type(error).__name__, error)
    terminal.complain(message)
    return code


def _with_notes(message: str, error: Exception) -> str:
    """Add what the library knows beside the error, such as how far an action on many commands came."""
    return "; ".join([message, *getattr(error, "__notes__", ())])


def _code(error: Exception) -> int:
    match error:
        case StoppedError():
            return INTERRUPTED
        case InvalidCommandError():
            return USAGE
        case DatabaseUnavailableError() | SchemaError() | SendTimeoutError():
            return DATABASE
        case psycopg.OperationalError() | psycopg.InterfaceError():
            return DATABASE
        case ConfigurationError():
            return CONFIGURATION
        case _:
            return REPORTED
