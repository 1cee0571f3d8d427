"""A durable command bus on PostgreSQL: see the README, `CommandBus` and `Worker`."""

from commandbus.bus import CommandBus
from commandbus.errors import (
    BusinessRuleError,
    ClosedError,
    CommandBusError,
    CommandError,
    CommandIdConflictError,
    CommandNotFoundError,
    CommandStateError,
    ConfigurationError,
    DatabaseUnavailableError,
    InvalidCommandError,
    LeaseLostError,
    OutcomeUnknownError,
    PartialSendError,
    PermanentCommandError,
    SchemaError,
    SendTimeoutError,
    TransientCommandError,
    WrongLoopError,
)
from commandbus.handlers import HandlerContext, HandlerRegistry, handler
from commandbus.model import AuditEvent, Command, CommandStatus, Error, Page, Receipt, SendRequest, Stat, Violation
from commandbus.policy import RetryPolicy
from commandbus.troubleshooting import TroubleshootingQueue
from commandbus.worker import Worker

__all__ = [
    "AuditEvent",
    "BusinessRuleError",
    "ClosedError",
    "Command",
    "CommandBus",
    "CommandBusError",
    "CommandError",
    "CommandIdConflictError",
    "CommandNotFoundError",
    "CommandStateError",
    "CommandStatus",
    "ConfigurationError",
    "DatabaseUnavailableError",
    "Error",
    "HandlerContext",
    "HandlerRegistry",
    "InvalidCommandError",
    "LeaseLostError",
    "OutcomeUnknownError",
    "Page",
    "PartialSendError",
    "PermanentCommandError",
    "Receipt",
    "RetryPolicy",
    "SchemaError",
    "SendRequest",
    "SendTimeoutError",
    "Stat",
    "TransientCommandError",
    "TroubleshootingQueue",
    "Violation",
    "Worker",
    "WrongLoopError",
    "handler",
]
