"""The command line: runs one subcommand, and turns however it ends into an exit code and at most one line on stderr.

Nothing here needs the `cli` extra, so that it can be missed in one clear line; the subcommands, which need it, stand
in `_subcommands.py`, and what they show in `_terminal.py`.
"""

from __future__ import annotations

import sys

import psycopg

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
    """Run what `sys.argv` says; returns the exit code. Exceptions that are nobody's doing pass, with a traceback."""
    try:
        import typer

        from commandbus import _subcommands, _terminal
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in {"typer", "rich"}:
            raise
        print("commandbus: the command line needs an extra: pip install 'commandbus[cli]'", file=sys.stderr)
        return CONFIGURATION
    _terminal.prepare()
    try:
        code = _subcommands.app(prog_name="commandbus", standalone_mode=False) or DONE
    except _subcommands.UsageError as error:
        hint = f" (see `{error.ctx.command_path} --help`)" if error.ctx else ""
        return _fail(USAGE, f"{error.format_message().rstrip('.')}{hint}")
    except (typer.Abort, KeyboardInterrupt):
        return _fail(INTERRUPTED, "interrupted")
    except _subcommands.InterruptedSendError as error:
        return _fail(INTERRUPTED, f"interrupted: {error}")
    except CommandBusError as error:
        return _fail(_code(error), str(error))
    except psycopg.Error as error:
        # Not str(error): the details and the context below the first line may quote a payload.
        return _fail(_code(error), error.diag.message_primary or type(error).__name__)
    return _fail(code, "interrupted") if code == INTERRUPTED else int(code)


def _fail(code: int, message: str) -> int:
    from commandbus import _terminal

    _terminal.complain(message)
    return code


def _code(error: Exception) -> int:
    match error:
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
