"""Every exception of the library.

    CommandBusError
    ├── InvalidCommandError       what was given cannot be a command           CB001
    ├── CommandNotFoundError      no command or process has this id in this domain   CB002
    ├── CommandStateError         its status does not allow this; another verb won   CB003
    ├── BatchNotFoundError        no batch has this id in this domain          CB005
    ├── CommandIdConflictError    the id was already sent with other contents
    ├── LeaseLostError            the outcome of a delivery can no longer be recorded
    ├── SendTimeoutError          the command was withdrawn: it was not sent
    ├── OutcomeUnknownError       it may or may not have been written; carries the id
    ├── ReplyTimeoutError         a command that was waited for has not ended yet; carries its domain and id
    ├── CommandParkedError        a command that was waited for is parked; carries its domain and id
    ├── PartialSendError          some chunks of a batch are durable; carries the receipts
    ├── DatabaseUnavailableError  no connection, or no room or time there; nothing was done
    ├── SchemaError               the database's schema does not fit this version
    ├── PermissionDeniedError     the role that is connected may not do this
    ├── ConfigurationError        a setting, an option or a registration is wrong   CB004
    ├── WrongLoopError            the object belongs to another event loop
    ├── SyncInAsyncError          a blocking call where an event loop runs
    ├── ClosedError               the object is not open
    └── CommandError              a handler's verdict on its command
        ├── TransientCommandError   try again after the back-off
        ├── PermanentCommandError   park it: an operator has to look
        └── BusinessRuleError       a business rule said no: FAILED, no operator needed

The codes are the SQLSTATEs that the SQL functions raise; `BY_SQLSTATE` is built from the classes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from uuid import UUID

    from commandbus.model import Receipt


class CommandBusError(Exception):
    """The root of all errors of this library."""

    sqlstate: ClassVar[str | None] = None


class InvalidCommandError(CommandBusError):
    """What was given cannot be a command; nothing was written. Correct the field that the message names."""

    sqlstate = "CB001"


class CommandNotFoundError(CommandBusError):
    """No command, or no process, has this id in this domain. It was never sent, or retention has dropped it."""

    sqlstate = "CB002"


class CommandStateError(CommandBusError):
    """The command's status does not allow this verb, or a filter finds another number of commands than was expected.

    Nothing was written. Read the command, or look with the filter, and decide anew.
    """

    sqlstate = "CB003"


class BatchNotFoundError(CommandBusError):
    """No batch has this id in this domain. It was never created, or retention has dropped it."""

    sqlstate = "CB005"


class ConfigurationError(CommandBusError):
    """A setting, an option or a registration is wrong; the message names it."""

    sqlstate = "CB004"


class _OfCommandError(CommandBusError):
    """An error that names its command; survives pickling and copying."""

    def __init__(self, message: str, command_id: UUID) -> None:
        super().__init__(message, command_id)
        self.command_id = command_id

    def __str__(self) -> str:
        return str(self.args[0])


class CommandIdConflictError(_OfCommandError):
    """The id was already sent with other contents, or is that of another batch or process; nothing was written."""


class LeaseLostError(CommandBusError):
    """The outcome of this delivery can no longer be recorded: its lease is lost, or its time is over. Stop."""


class SendTimeoutError(_OfCommandError):
    """The command was withdrawn before it left: it was not sent. Sending it again is safe."""


class OutcomeUnknownError(_OfCommandError):
    """The command, the batch or the process may or may not have been written. `command_id` is its id.

    Send, create or start it again with that id: that is idempotent.
    """


class _AwaitedError(_OfCommandError):
    """An error about a command that was waited for."""

    def __init__(self, message: str, command_id: UUID, domain: str) -> None:
        super().__init__(message, command_id)
        self.args = message, command_id, domain
        self.domain = domain


class ReplyTimeoutError(_AwaitedError):
    """The command has not ended within the timeout. It still may: wait again for this domain and id."""


class CommandParkedError(_AwaitedError):
    """The command is parked, and an operator has to decide. It may still end: wait again for this domain and id."""


class PartialSendError(CommandBusError):
    """A chunk of `send_batch` failed. `receipts` are of the commands that are durable; the cause is chained."""

    def __init__(self, message: str, receipts: Sequence[Receipt]) -> None:
        super().__init__(message, tuple(receipts))
        self.receipts = tuple(receipts)

    def __str__(self) -> str:
        return str(self.args[0])


class DatabaseUnavailableError(CommandBusError):
    """No working connection to PostgreSQL could be had in time, or it cannot do now what was asked.

    It lacks room or time, or takes no writes. Nothing was done, or only something was read.
    """


class SchemaError(CommandBusError):
    """The database has no schema of ours, or one that does not fit this version. Run `commandbus migrate`."""


class PermissionDeniedError(CommandBusError):
    """The role that is connected may not do this; nothing was done. The message names the role that it needs."""


class WrongLoopError(CommandBusError):
    """The object was opened on another event loop. Open one for each loop."""


class SyncInAsyncError(CommandBusError):
    """A blocking call in a thread whose event loop it would stop. Await the async method that the message names."""


class ClosedError(CommandBusError):
    """The object is not open: it was never opened, or is closed already."""


class CommandError(CommandBusError):
    """A handler's verdict on its command. Raise one of the three classes below.

    `code` is a short stable name for programs, `message` a sentence for people, `details` any JSON value.
    All three are kept with the command.
    """

    code: str = ""  # of a subclass whose __init__ does not call this one
    message: str = ""
    details: object = None

    def __init__(self, code: str, message: str = "", details: object = None) -> None:
        super().__init__(code, message, details)
        self.code = code
        self.message = message
        self.details = details

    def __str__(self) -> str:
        return f"{self.code}: {self.message}" if self.message else str(self.code)


class TransientCommandError(CommandError):
    """It may work later: `IN_PROGRESS -> SCHEDULED` after the back-off, or parked when attempts are used up."""


class PermanentCommandError(CommandError):
    """It cannot work as it is: `IN_PROGRESS -> IN_TROUBLESHOOTING_QUEUE` at once."""


class BusinessRuleError(CommandError):
    """A business rule said no: `IN_PROGRESS -> FAILED`, final, no operator needed."""


def _all_subclasses(cls: type[CommandBusError]) -> Iterator[type[CommandBusError]]:
    for sub in cls.__subclasses__():
        yield sub
        yield from _all_subclasses(sub)


BY_SQLSTATE: dict[str, type[CommandBusError]] = {
    cls.sqlstate: cls for cls in _all_subclasses(CommandBusError) if cls.sqlstate is not None
}
