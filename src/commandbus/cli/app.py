"""The application: the subcommands under their names."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as version_of
from typing import Annotated, cast

import typer

from commandbus._limits import text_problem
from commandbus.cli import batches, commands, desk, doctor, edit, parked, process, processes, terminal, verbs, verify
from commandbus.cli.database import StoppedError

UsageError = cast("type[typer.BadParameter]", typer.BadParameter.__base__)
"""What typer raises for arguments that it cannot use; the class has no public name there."""

_EXIT_CODES = """\
Exit codes: 0 done. 1 it failed, and says why: not found, a conflict, the wrong status, a check of the doctor's.
2 wrong usage.
3 the database cannot be reached, or its schema is missing or does not fit. 4 the configuration: no DSN, a missing
extra, no PostgreSQL to start. 130 interrupted."""

_TYPER_INTERRUPTED = 130  # what typer returns after Ctrl-C; older versions raise Abort

_app = typer.Typer(
    help="A durable command bus on PostgreSQL.",
    epilog=_EXIT_CODES,
    add_completion=False,
    pretty_exceptions_enable=False,
)
_troubleshooting = typer.Typer(
    help="The commands that wait for a person, and the three things to do with one, or with many.", epilog=_EXIT_CODES
)
_app.add_typer(_troubleshooting, name="troubleshooting")
_batch = typer.Typer(
    help="Commands that are counted together: how far they are, and what to do with them.", epilog=_EXIT_CODES
)
_app.add_typer(_batch, name="batch")

_process = typer.Typer(
    help="The process managers: what they wait for, and what an operator can do.", epilog=_EXIT_CODES
)
_app.add_typer(_process, name="process")

_top: dict[str, Callable[..., object]] = {
    "migrate": processes.migrate,
    "worker": processes.worker,
    "send": commands.send,
    "show": commands.show,
    "list": desk.list_commands,
    "stats": desk.stats,
    "workers": desk.workers,
    "doctor": doctor.doctor,
    "verify": verify.verify,
    "demo": processes.demo,
    "dev": processes.dev,
}
_below: dict[str, Callable[..., object]] = {
    "list": parked.list_parked,
    "groups": parked.groups,
    "show": parked.show_parked,
    "edit": edit.edit,
    "retry": verbs.retry,
    "cancel": verbs.cancel,
    "complete": verbs.complete,
}
_of_batches: dict[str, Callable[..., object]] = {
    "list": batches.list_batches,
    "show": batches.show,
    "watch": batches.watch,
    "cancel": batches.cancel,
    "retry": batches.retry,
}
_of_processes: dict[str, Callable[..., object]] = {
    "list": process.list_processes,
    "show": process.show,
    "timeline": process.timeline,
    "retry": process.retry,
    "cancel": process.cancel,
    "resume": process.resume,
}
for _group, _subcommands in (
    (_app, _top),
    (_troubleshooting, _below),
    (_batch, _of_batches),
    (_process, _of_processes),
):
    for _name, _subcommand in _subcommands.items():
        _group.command(_name, epilog=_EXIT_CODES)(_subcommand)


def run() -> int:
    """Run what `sys.argv` says; returns the exit code. Raises `UsageError`, `StoppedError` and the library's errors."""
    for number, argument in enumerate(sys.argv[1:], 1):
        if text_problem(argument):  # a byte that is no text comes as a lone surrogate, which no driver takes
            raise UsageError(f"argument {number} is not UTF-8")
    try:
        code = _app(prog_name="commandbus", standalone_mode=False)
    except (typer.Abort, KeyboardInterrupt):
        raise StoppedError from None
    if code == _TYPER_INTERRUPTED:
        raise StoppedError
    return int(code or 0)


def _show_version(value: bool) -> None:  # noqa: FBT001 - called by typer
    if value:
        try:
            terminal.say(f"commandbus {version_of('commandbus')}")
        except PackageNotFoundError:
            terminal.say("commandbus, run from a folder without being installed: version unknown")
        raise typer.Exit


@_app.callback()
def _options(
    *,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Do nothing: the callback of the one option does it."""
