"""How a delivery ended, as a value; the finisher makes one call of each."""

from __future__ import annotations

import json
import re
import traceback
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TypeAlias

from commandbus._calls import MAX_BYTES
from commandbus._failures import brief
from commandbus.errors import BusinessRuleError, CommandError, PermanentCommandError
from commandbus.handlers import Handler
from commandbus.model import Json

MAX_TEXT = 4096
_OURS = str(Path(__file__).parents[1])
_UNSTORABLE = re.compile("[\x00\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class Completed:
    """The handler returned; `result` is JSON text."""

    result: str


@dataclass(frozen=True, slots=True)
class Failed:
    """The handler did not succeed. `kind` is TRANSIENT, PERMANENT or BUSINESS, `error` JSON text."""

    kind: str
    error: str
    retry_in: timedelta
    max_attempts: int


@dataclass(frozen=True, slots=True)
class Released:
    """The handler did not end; nothing is charged."""


@dataclass(frozen=True, slots=True)
class Recorded:
    """The outcome is in the database already, or the lease is lost: there is nothing left to call."""


Ending: TypeAlias = Completed | Failed | Released | Recorded


def completed(result: Json) -> Completed:
    """Return the ending of a handler that returned this. Raises `PermanentCommandError` if it cannot be kept."""
    try:
        text = json.dumps(result, allow_nan=False, separators=(",", ":"))
    except (TypeError, ValueError, RecursionError) as error:
        raise PermanentCommandError("RESULT_NOT_JSON", str(error)) from None
    if len(text) > MAX_BYTES:
        reason = f"the result has {len(text):,} bytes: at most {MAX_BYTES:,} are kept"
        raise PermanentCommandError("RESULT_TOO_LARGE", reason)
    return Completed(text)


def failed(error: BaseException, handler: Handler, attempt: int) -> Failed:
    """Return the ending of a handler that raised this. What is not a `CommandError` is transient."""
    match error:
        case BusinessRuleError():
            kind = "BUSINESS"
        case PermanentCommandError():
            kind = "PERMANENT"
        case _:
            kind = "TRANSIENT"
    code: object
    message: object
    if isinstance(error, CommandError):
        code, message, details = error.code, error.message, error.details
    else:
        code, message, details = type(error).__name__, error, {"traceback": _traceback(error)}
    text = _error_text(code, message, details)
    return Failed(kind, text, handler.retry.wait_after(attempt), handler.retry.max_attempts)


def unreadable(error: Exception) -> PermanentCommandError:
    """Return what becomes of a command whose data Python cannot read."""
    return PermanentCommandError("UNREADABLE", f"the data cannot be read: {error}")


def unstorable(error: Exception) -> PermanentCommandError:
    """Return what becomes of a result that the database refuses."""
    return PermanentCommandError("UNSTORABLE", f"PostgreSQL refuses the result: {brief(error)}")


def storable(value: object) -> str:
    """Return a text as PostgreSQL can keep it: no NUL, no lone surrogates, not longer than 4,096 characters."""
    try:
        text = str(value)
    except Exception as error:  # noqa: BLE001 - a user's __str__
        text = f"<{type(value).__name__} that cannot be shown: {type(error).__name__}>"
    return _UNSTORABLE.sub("\N{REPLACEMENT CHARACTER}", text[:MAX_TEXT])


def _traceback(error: BaseException) -> str:
    """Return where it happened: the frames of the user's code, the end of them."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(_OURS)]
    return "".join(traceback.format_list(frames))[-MAX_TEXT // 2 :]


def _error_text(code: object, message: object, details: Json) -> str:
    error: dict[str, Json] = {"code": storable(code)[:128], "message": storable(message)}
    if details is not None:
        error["details"] = _storable_json(details)
    return json.dumps(error)


def _storable_json(details: Json) -> Json:
    """Return the details as they are if PostgreSQL can keep them, else as text."""
    try:
        text = json.dumps(details, allow_nan=False, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):
        return storable(details)
    if len(text) > MAX_TEXT or _UNSTORABLE.search(text) or "\\u0000" in text:
        return storable(text)
    return details
