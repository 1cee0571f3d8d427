"""How a delivery ended, as a value; the finisher makes one call of each."""

from __future__ import annotations

import json
import re
import traceback
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import TypeAlias

from commandbus._failures import brief
from commandbus._limits import encode
from commandbus.errors import BusinessRuleError, CommandError, InvalidCommandError, PermanentCommandError
from commandbus.handlers import Handler
from commandbus.model import Json

MAX_CODE = 128
MAX_TEXT = 4096
_MAX_DETAILS = 16384  # bytes; a traceback of ours fits, whatever its letters
_CUT = "... (cut off)"
_OURS = str(Path(__file__).parents[1])
_UNSTORABLE = re.compile("[\x00\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class Completed:
    """The handler returned; `result` is JSON text. `replaced`: it stands for a result that cannot be kept."""

    result: str
    replaced: bool = False


@dataclass(frozen=True, slots=True)
class Failed:
    """The handler did not succeed. `kind` is TRANSIENT, PERMANENT or BUSINESS, `error` JSON text.

    `replaced`: it stands for an error that cannot be kept.
    """

    kind: str
    error: str
    retry_in: timedelta
    max_attempts: int
    replaced: bool = False


@dataclass(frozen=True, slots=True)
class Released:
    """The handler did not end; nothing is charged."""


@dataclass(frozen=True, slots=True)
class Recorded:
    """The outcome is in the database already, or the lease is lost: there is nothing left to call."""


_WITHOUT_RESULT = Completed("null")  # most commands; the check of the limits takes 3 us

Ending: TypeAlias = Completed | Failed | Released | Recorded


def completed(result: Json) -> Completed:
    """Return the ending of a handler that returned this.

    The work is done, and to do it again would not make the result any better: one that breaks a limit is replaced by a
    note that says why and shows how it begins.
    """
    if result is None:
        return _WITHOUT_RESULT
    try:
        return Completed(encode(result, "result", any_keys=True))
    except Exception as error:  # noqa: BLE001 - an object of the user's may raise anything while it is read
        return Completed(json.dumps(_note("result", error, result)), replaced=True)


def failed(error: BaseException, handler: Handler, attempt: int) -> Failed:
    """Return the ending of a handler that raised this. What is not a `CommandError` is transient."""
    match error:
        case BusinessRuleError():
            kind = "BUSINESS"
        case PermanentCommandError():
            kind = "PERMANENT"
        case _:
            kind = "TRANSIENT"
    if isinstance(error, CommandError):
        text = _error_text(code_of(error), error.message, error.details)
    else:
        text = _error_text(code_of(error), error, {"traceback": _traceback(error)})
    return Failed(kind, text, handler.retry.wait_after(attempt), handler.retry.max_attempts)


def code_of(error: BaseException) -> str:
    """Return the short name under which an error is kept."""
    code = error.code if isinstance(error, CommandError) else None
    return storable(type(error).__name__ if code is None or code == "" else code, MAX_CODE)


def unreadable(error: Exception) -> PermanentCommandError:
    """Return what becomes of a command whose data Python cannot read."""
    return PermanentCommandError("UNREADABLE", f"the data cannot be read: {error}")


def unstorable(error: Exception) -> PermanentCommandError:
    """Return what becomes of a result that the database refuses."""
    return PermanentCommandError("UNSTORABLE", f"PostgreSQL refuses the result: {brief(error)}")


def without_words(ending: Failed, error: Exception) -> Failed:
    """Return the same verdict, its error replaced by one in ASCII: the database refuses the handler's words.

    A database in another encoding than UTF-8 does not know every character.
    """
    text = json.dumps(
        {
            "code": "UNSTORABLE",
            "message": f"PostgreSQL refuses the error: {brief(error)!a}",
            "details": _note("error", error, ending.error),
        }
    )
    return replace(ending, error=text, replaced=True)


def storable(value: object, most: int = MAX_TEXT) -> str:
    """Return a text as PostgreSQL can keep it: no NUL, no lone surrogates, at most so many characters."""
    try:
        text = str(value)
    except Exception as error:  # noqa: BLE001 - a user's __str__
        text = f"<{type(value).__name__} that cannot be shown: {type(error).__name__}>"
    if len(text) > most:
        text = text[: most - len(_CUT)] + _CUT
    return _UNSTORABLE.sub("\N{REPLACEMENT CHARACTER}", text)


def _traceback(error: BaseException) -> str:
    """Return where it happened: the frames of the user's code, the end of them."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(_OURS)]
    text = "".join(traceback.format_list(frames))
    return storable(text if len(text) <= MAX_TEXT // 2 else f"{_CUT}\n{text[-MAX_TEXT // 2 :]}")


def _error_text(code: str, message: object, details: Json) -> str:
    error: dict[str, Json] = {"code": code, "message": storable(message)}
    if details is not None:
        error["details"] = _storable_details(details)
    return json.dumps(error)


def _storable_details(details: Json) -> Json:
    """Return the details as they are if they can be kept, else a note."""
    try:
        encode(details, "details", _MAX_DETAILS, any_keys=True)
    except Exception as error:  # noqa: BLE001 - as above
        return _note("details", error, details)
    return details


def _note(name: str, error: Exception, value: Json) -> Json:
    """Return what is recorded in place of a value that cannot be kept."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except Exception:  # noqa: BLE001 - as above
        text = value
    reason = error if isinstance(error, InvalidCommandError) else f"{name} cannot be read: {type(error).__name__}"
    return {"commandbus": f"{name} replaced", "reason": storable(reason), "text": storable(text)}
