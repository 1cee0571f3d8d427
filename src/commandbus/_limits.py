"""What JSON may be sent and kept: the limits that the SQL functions have too, told with the path of what breaks them.

Checked on the JSON text first, in C; Python walks through a value only where the text leaves a doubt. Nanoseconds for
5 keys (88 bytes), and for 90 values nested (677 bytes): `json.dumps` alone 2,400 and 13,800, `encode` 2,600 and 17,100;
a walk through each value instead of the search for keys took 700 and 10,000 where that takes 340 and 2,700.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Iterator
from decimal import Decimal
from types import NoneType

from commandbus.errors import InvalidCommandError
from commandbus.model import Json

MAX_BYTES = 1 << 20
"""Of one result; of the data of one command, the most that `max_data_bytes` can be. And about a statement's worth."""
MAX_DEPTH = 64
MAX_HEADER_BYTES = 8192
MAX_CORRELATION_ID = 256
_MAX_DIGITS = 4300  # a longer integer is not read back: sys.int_info.default_max_str_digits
_TOO_LONG = 10**_MAX_DIGITS
_MAX_PATH = 200
_MAX_SHOWN = 100

_SCALARS = frozenset({str, int, float, bool, NoneType})
_SURROGATE = re.compile("[\ud800-\udfff]")
_LONG_INTEGER = re.compile(rf"(?<![0-9])[0-9]{{{_MAX_DIGITS + 1}}}")
# What `json.dumps` makes of a key that is no string. The look ahead saves a third of the time.
_MADE_KEY = re.compile(r'"(?=[-0-9tfn])(?:-?[0-9][0-9.e+-]*|true|false|null)":')
_EXPONENT = 330  # 5e-324 has 326 characters when PostgreSQL writes it
_MOST = 64  # times a text can grow when PostgreSQL writes it

_to_text = json.JSONEncoder(allow_nan=False, separators=(",", ":")).encode
_to_plain_text = json.JSONEncoder(ensure_ascii=False).encode


def encode(value: Json, what: str, max_bytes: int = MAX_BYTES, *, any_keys: bool = False) -> str:
    """Return JSON text, of ASCII only; raises `InvalidCommandError` with the path of what breaks a limit.

    `what` is how the message begins: whose value it is, and the name of the field. `any_keys`: keys may be what
    `json.dumps` turns into strings.
    """
    try:
        text = _to_text(value)
    except (TypeError, ValueError, RecursionError) as error:
        path, problem = _fault(value, any_keys=any_keys) or ("", f"cannot be written as JSON: {type(error).__name__}")
        raise InvalidCommandError(f"{what}{path} {problem}") from None
    if _is_doubtful(value, text, any_keys=any_keys) and (fault := _fault(value, any_keys=any_keys)):
        raise InvalidCommandError(f"{what}{fault[0]} {fault[1]}")
    if len(text) * _MOST > max_bytes and _at_most(text) > max_bytes and (size := _size(value)) > max_bytes:
        raise InvalidCommandError(
            f"{what} has {size:,} bytes as JSON text, at most {max_bytes:,} are allowed: keep the bulk elsewhere"
        )
    return text


def _is_doubtful(value: Json, text: str, *, any_keys: bool) -> bool:
    """Whether the value may break a limit other than that of size; False is certain."""
    return (
        ("\\" in text and ("\\u0000" in text or ("\\ud" in text and not _is_unicode(value))))
        or not (any_keys or _MADE_KEY.search(text) is None)
        or (text.count("[") + text.count("{") > MAX_DEPTH and not _is_shallow(value))
        or (
            len(text) > _MAX_DIGITS
            and not 0 < sys.get_int_max_str_digits() <= _MAX_DIGITS  # Python would have refused to write it
            and _LONG_INTEGER.search(text) is not None
        )
    )


def _is_unicode(value: Json) -> bool:
    """Whether no text in it has a lone surrogate; half a pair of two is alone, too: it would come back as one."""
    try:
        _to_plain_text(value).encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_shallow(value: Json) -> bool:
    """Whether it is not nested too deep; False where a scalar of a class of its own stands as deep as that."""
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            inner
            for outer in level
            for inner in (
                outer.values() if isinstance(outer, dict) else outer if isinstance(outer, list | tuple) else ()
            )
            if type(inner) not in _SCALARS
        ]
        if not level:
            return True
    return False


# -- size --------------------------------------------------------------------------------------------------------------


def _at_most(text: str) -> int:
    """Return a bound of the size of what this text stands for."""
    return 2 * len(text) + _EXPONENT * (text.count("e-") + text.count("e+"))  # a space after each comma and colon


def _size(value: Json) -> int:
    """Return how many bytes PostgreSQL's own text of it has: `octet_length(value::text)` of a jsonb."""
    text = _to_plain_text(value)
    more = 0

    def grow(number: str) -> None:
        nonlocal more
        plain = format(Decimal(number), "f")
        more += len(plain) - len(number) - (plain == "-0.0")

    json.loads(text, parse_float=grow)
    return len(text.encode()) + more


# -- what is wrong, and where ------------------------------------------------------------------------------------------


def _fault(value: Json, *, any_keys: bool) -> tuple[str, str] | None:
    """Return the path of the first thing that breaks a limit other than that of size, and what is to be said of it."""
    waiting: list[tuple[Json, str, int]] = [(value, "", 0)]
    while waiting:
        node, path, depth = waiting.pop()
        problem = _problem(node, depth, any_keys=any_keys)
        if problem is not None:
            return path, problem
        waiting += reversed(list(_children(node, path, depth + 1)))
    return None


def _problem(node: Json, depth: int, *, any_keys: bool) -> str | None:
    if not isinstance(node, dict | list | tuple):
        return _problem_of_scalar(node)
    if depth >= MAX_DEPTH:
        return f"is nested deeper than {MAX_DEPTH} levels: make it flatter"
    keys = node if isinstance(node, dict) else ()
    return next(filter(None, (_problem_of_key(key, any_keys=any_keys) for key in keys)), None)


def _problem_of_key(key: object, *, any_keys: bool) -> str | None:
    if not isinstance(key, str) and not (any_keys and isinstance(key, int | float | None)):
        return f"has a key of the class {type(key).__name__}: keys are strings in JSON"
    problem = _problem_of_scalar(key)
    return None if problem is None else f"has a key that {problem}"


def _problem_of_scalar(value: object) -> str | None:
    match value:
        case str():
            return text_problem(value)
        case float() if not math.isfinite(value):
            return "is not a finite number: JSON has no NaN and no infinity; send null or a string"
        case int() if abs(value) >= _TOO_LONG:
            return f"is an integer of more than {_MAX_DIGITS:,} digits: send it as a string"
        case None | int() | float():
            return None
        case _:
            return (
                f"is of the class {type(value).__name__}, which JSON does not have: send a dict, list, str, int, "
                "float, bool or None"
            )


def text_problem(text: str) -> str | None:
    """Return what PostgreSQL cannot keep in this text."""
    if "\0" in text:
        return "has a NUL character, which PostgreSQL cannot keep: remove it"
    if _SURROGATE.search(text):
        return "has a lone surrogate, which is no character: correct how the text was decoded"
    return None


def shown(value: object) -> str:
    """Return how a name, an id or a number that was given looks, for a message: cut off, whatever it is."""
    try:
        text = repr(value)
    except Exception as error:  # noqa: BLE001 - an integer of many digits, or a user's __repr__
        text = f"a {type(value).__name__} that cannot be shown ({type(error).__name__})"
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}..."


def _children(node: Json, path: str, depth: int) -> Iterator[tuple[Json, str, int]]:
    if isinstance(node, dict):
        for key, inner in node.items():
            yield inner, _cut(f"{path}{_step(key)}"), depth
    elif isinstance(node, list | tuple):
        for number, inner in enumerate(node):
            yield inner, _cut(f"{path}[{number}]"), depth


def _step(key: object) -> str:
    text = (str.__str__(key) if isinstance(key, str) else str(key))[:_MAX_PATH]
    return f".{text}" if text.isascii() and text.isidentifier() else f"[{json.dumps(text)}]"


def _cut(path: str) -> str:
    return path if len(path) <= _MAX_PATH else f"{path[:_MAX_PATH]}..."
