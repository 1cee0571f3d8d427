"""Hostile input for Hypothesis, and a plain look at it: what fits the limits, and how it comes back."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import math
import re
import uuid
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from fractions import Fraction
from typing import Any

import psycopg
from hypothesis import strategies as st

from commandbus import BusinessRuleError, CommandError, PermanentCommandError, TransientCommandError
from tests.support import nested
from tests.values import Colour, Size

MAX_DATA = 8192  # bytes; so that payloads at the edge are small, and many
DOMAIN = "fuzz"
ASYNC, BLOCKING, TRANSACTIONAL = "Async", "Blocking", "Transactional"

# -- texts -------------------------------------------------------------------------------------------------------------

STEERING = [
    "\x1b[2J\x1b[31m", "\x1b]0;title\x07", "\x9b31m", "\x90q\x9c", "\x08\x7f", "\r", "\r\n", "\t", "\x0b", "\x85",
    "\u2028", "\u2029", "\u202e", "\u2066", "\u200b", "\u200d", "\ufeff", "\ufff9", "\U000e0041",
    "\n2026-01-01 INFO forged: line", "[red]markup[/red]", ":smile:", "%s%n", "{0.__class__}", "'; DROP TABLE x --",
    "\\u0000", '\\"', "e\u0301", "😀",
]  # fmt: skip
_BROKEN = ["\0", "\ud800", "\udfff", "\ud83d\ude00"]

TEXTS = st.lists(st.sampled_from(STEERING) | st.text(max_size=5).map(lambda text: text.replace("\0", "")), max_size=4)
GOOD_TEXTS = TEXTS.map("".join)
BAD_TEXTS = st.tuples(GOOD_TEXTS, st.sampled_from(_BROKEN), GOOD_TEXTS).map("".join)
ANY_TEXTS = GOOD_TEXTS | BAD_TEXTS
WORDS = st.integers(0, 4).flatmap(lambda n: GOOD_TEXTS if n else BAD_TEXTS)

# -- values ------------------------------------------------------------------------------------------------------------


class Text(str):
    """A text that shows itself in another way."""

    __slots__ = ()

    def __str__(self) -> str:
        raise RuntimeError("no text")


class Real(float):
    def __repr__(self) -> str:
        return "not a number"


class Twice(dict[str, object]):
    """Has each key twice; the last one counts."""

    def items(self) -> Any:  # noqa: ANN401 - what a dict returns has no public name
        return [*((key, None) for key in self), *super().items()]


@dataclasses.dataclass(frozen=True)
class Point:
    x: int = 1


class Nobody:
    """What can be neither shown nor compared."""

    def __repr__(self) -> str:
        raise RuntimeError("no text")


def _endless() -> object:
    found: list[object] = [1]
    found.append({"again": found})
    return found


def _named(**examples: object) -> st.SearchStrategy[Any]:
    """One of these; Hypothesis would show them by themselves, which some of them do not survive."""
    return st.sampled_from(sorted(examples)).map(lambda name: examples[name])


def of_size(size: int) -> str:
    """A text that has so many bytes as JSON."""
    return "x" * (size % 2) + "ü" * (size // 2 - 1)


_GOOD_SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | GOOD_TEXTS
    | st.sampled_from(
        [2**53 + 1, -(2**63) - 1, 2**64, 5e-324, -0.0, 1e16, 1.5e300, -1e22, 0.1,
         Size.LARGE, Colour.RED]
    )
    | _named(text=Text("t"), real=Real(0.5), digits=10**400, most_digits=10**4300 - 1,
             large=of_size(MAX_DATA), smaller=of_size(MAX_DATA - 1))
)  # fmt: skip
_BAD_SCALARS = BAD_TEXTS | _named(
    nan=math.nan, inf=math.inf, minus_inf=-math.inf, long=10**4300, longer=-(10**5000), decimal=Decimal("1.5"),
    fraction=Fraction(1, 3), bytes=b"x", bytearray=bytearray(b"x"), set={1, 2}, object=object(), point=Point(),
    nobody=Nobody(), complex=1j, datetime=datetime.now(UTC), uuid=uuid.UUID(int=1), range=range(3), type=type,
    function=len, ellipsis=..., endless=_endless(), deep=nested(1000), deeper=nested(100_000),
    large=of_size(MAX_DATA + 1),
)  # fmt: skip
_GOOD_KEYS = (
    GOOD_TEXTS | st.sampled_from(["", "1", "null", "true", "-1.5", "k" * 500, Colour.RED]) | _named(text=Text("k"))
)
_BAD_KEYS = BAD_TEXTS | _named(bytes=b"k", tuple=(1, 2), enum=Size.LARGE, nan=math.nan, long=10**4300, nobody=Nobody())
_LOOSE_KEYS = st.sampled_from([1, True, None, 1.5, -0.0])


def _wrapped(depth: int, value: object) -> object:
    for n in range(depth):
        value = [value] if n % 2 else {"k": value}
    return value


def _containers(inner: st.SearchStrategy[Any], keys: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(keys, inner, max_size=3)
        | st.dictionaries(keys, inner, max_size=2).map(Twice)
        | st.tuples(st.sampled_from([1, 62, 63, 64, 65]), inner).map(lambda pair: _wrapped(*pair))
    )


GOOD_VALUES = st.recursive(_GOOD_SCALARS, lambda inner: _containers(inner, _GOOD_KEYS), max_leaves=6)
LOOSE_VALUES = _containers(GOOD_VALUES, _GOOD_KEYS | _LOOSE_KEYS)
BAD_VALUES = st.recursive(
    _BAD_SCALARS | st.dictionaries(_BAD_KEYS, _GOOD_SCALARS, min_size=1, max_size=2),
    lambda inner: st.tuples(_GOOD_SCALARS, inner) | st.builds(lambda key, of: {key: of}, _GOOD_KEYS, inner),
    max_leaves=2,
)
VALUES = st.integers(0, 9).flatmap(lambda n: BAD_VALUES if n == 0 else LOOSE_VALUES if n == 1 else GOOD_VALUES)


def fits(value: object, max_bytes: int = MAX_DATA, *, any_keys: bool = False) -> bool:
    """Whether a value is within the limits, by a plain look at all that is in it."""
    waiting: list[tuple[object, int]] = [(value, 0)]
    while waiting:
        part, depth = waiting.pop()
        if isinstance(part, dict):
            if not all(isinstance(key, str) or (any_keys and isinstance(key, int | float | None)) for key in part):
                return False
            waiting += [(key, 0) for key in part]
        if isinstance(part, dict | list | tuple):
            if depth >= 64:
                return False
            inner = [of for _, of in part.items()] if isinstance(part, dict) else part
            waiting += [(of, depth + 1) for of in inner]
        elif not _is_fine(part):
            return False
    return len(written(as_stored(value)).encode()) <= max_bytes


def _is_fine(scalar: object) -> bool:
    match scalar:
        case str():
            return re.search("[\0\ud800-\udfff]", scalar) is None
        case float():
            return math.isfinite(scalar)
        case int():
            return abs(scalar) < 10**4300
        case _:
            return scalar is None


def written(value: object) -> str:
    """JSON text as PostgreSQL writes it: a space after each comma and colon, numbers with all their digits."""
    match value:
        case dict():
            return f"{{{', '.join(f'{written(key)}: {written(of)}' for key, of in value.items())}}}"
        case list():
            return f"[{', '.join(map(written, value))}]"
        case float():
            return format(Decimal(repr(value)), "f")
        case _:
            return json.dumps(value, ensure_ascii=False)


def as_stored(value: object) -> Any:  # noqa: ANN401 - JSON
    """How a value that fits comes back: plain classes, a large float as an integer, no negative zero."""
    match value:
        case dict():
            return {_key(key): as_stored(of) for key, of in value.items()}
        case list() | tuple():
            return [as_stored(of) for of in value]
        case None | bool():
            return value
        case str():
            return str.__str__(value)
        case int():
            return int(value)
        case float():
            digits = format(Decimal(float.__repr__(value)), "f")
            return float(digits) + 0.0 if "." in digits else int(digits)
        case _:
            raise AssertionError(f"{type(value).__name__} cannot come back")


def _key(key: object) -> str:
    if isinstance(key, str):
        return str.__str__(key)
    return (
        json.dumps(key) if isinstance(key, bool | None) else float.__repr__(key) if isinstance(key, float) else str(key)
    )


def same(one: object, other: object) -> bool:
    """Whether two JSON values are the same, 1 and 1.0 and True not being so."""
    first, second = (json.dumps(value, sort_keys=True) for value in (one, other))
    return first == second


# -- commands ----------------------------------------------------------------------------------------------------------

_ODD = _named(
    long=10**5000, real=1.5, nan=math.nan, decimal=Decimal("NaN"), bytes=b"1", bool=True, list=[1], nobody=Nobody(),
    deep=nested(100_000), large="x" * 10**6,
)  # fmt: skip
_BAD_NAMES = (
    BAD_TEXTS
    | _ODD
    | st.sampled_from(["", "x" * 129, "a b", "é", "a\n", *(text for text in STEERING if text != ":smile:")])
)
_HEADERS = st.dictionaries(_GOOD_KEYS, GOOD_TEXTS | _named(text=Text("t")), max_size=3)
_BAD_HEADERS = (
    _ODD
    | st.dictionaries(_GOOD_KEYS | _BAD_KEYS, BAD_TEXTS | _ODD, min_size=1, max_size=2)
    | st.dictionaries(_BAD_KEYS, GOOD_TEXTS, min_size=1, max_size=1)
    | st.sampled_from([{"k": None}, {"k": "x" * 8192}])
)
_BAD_OPTIONS: dict[str, st.SearchStrategy[Any]] = {
    "data": BAD_VALUES,
    "domain": _BAD_NAMES,
    "command_type": _BAD_NAMES,
    "command_id": _ODD | ANY_TEXTS,
    "correlation_id": BAD_TEXTS | _ODD | st.just("x" * 257),
    "reply_to": _BAD_NAMES,
    "max_attempts": _ODD | ANY_TEXTS | st.sampled_from([-1, 0, 1_000_001]),
    "priority": _ODD | st.sampled_from([-101, 101]),
    "delay": _ODD | st.sampled_from([timedelta(microseconds=-1), timedelta.max, timedelta.min]),
    "headers": _BAD_HEADERS,
}
_GOOD_COMMANDS = st.fixed_dictionaries(
    {
        "domain": st.just(DOMAIN),
        "command_type": st.sampled_from([ASYNC, ASYNC, BLOCKING, TRANSACTIONAL]),
        "data": GOOD_VALUES,
    },
    optional={
        "correlation_id": GOOD_TEXTS | st.just("x" * 256),
        "max_attempts": st.just(1),
        "priority": st.sampled_from([-100, 1, 100]),
        "delay": st.just(timedelta(0)),
        "headers": _HEADERS,
    },
)
_FITTING = _GOOD_COMMANDS.filter(lambda given: fits(given["data"]))


class Case:
    """A command, and what its handler does: return `result`, or raise `error`. Can be shown, whatever is in it."""

    def __init__(self, given: dict[str, Any], result: object = None, error: BaseException | None = None) -> None:
        self.given = given
        self.result = result
        self.error = error

    def __repr__(self) -> str:
        parts = self.given | {"-> result": self.result, "-> error": self.error}
        return f"Case({', '.join(f'{name}: {_shown(part)}' for name, part in parts.items())})"


def _shown(value: object) -> str:
    try:
        return repr(value)[:1000]
    except Exception as error:  # noqa: BLE001 - it is hostile
        return f"<{type(value).__name__} that cannot be shown: {type(error).__name__}>"


@st.composite
def _bad_commands(draw: st.DrawFn) -> Case:
    name = draw(st.sampled_from(sorted(_BAD_OPTIONS)))
    return Case(draw(_FITTING) | {name: draw(_BAD_OPTIONS[name])})


BAD_COMMANDS = _bad_commands()

# -- endings -----------------------------------------------------------------------------------------------------------


class Mute(Exception):  # noqa: N818 - what a handler may raise
    """Cannot say what went wrong."""

    def __str__(self) -> str:
        raise RuntimeError("no words")


class Liar(Exception):  # noqa: N818 - as above
    def __str__(self) -> str:
        return 7  # type: ignore[return-value]  # noqa: PLE0307 - it is one


class Forgetful(BusinessRuleError):  # noqa: N818 - as above
    """Does not call the constructor of its base class."""

    def __init__(self) -> None:
        pass


class Hidden(PermanentCommandError):  # noqa: N818 - as above
    @property
    def code(self) -> str:
        raise RuntimeError("no code")

    @code.setter
    def code(self, value: str) -> None:
        pass


class Stop(StopIteration):
    def __str__(self) -> str:
        raise RuntimeError("no words")


Forger = type("Forger\n2026-01-01 INFO forged: line\x1b[31m", (Exception,), {})

_ODD_EXCEPTIONS: list[Callable[[], BaseException]] = [
    Mute, Liar, Forgetful, lambda: Hidden("X"), Stop, Forger, KeyboardInterrupt, SystemExit, GeneratorExit,
    StopIteration, asyncio.CancelledError, TimeoutError, RecursionError, MemoryError,
    lambda: ExceptionGroup("\0", [ValueError("\ud800")]), lambda: ValueError(10**5000), lambda: ValueError(b"\xff"),
    lambda: UnicodeDecodeError("utf-8", b"\xff", 0, 1, "\x1b"), lambda: psycopg.errors.UniqueViolation("\x1b[31m"),
    lambda: psycopg.OperationalError("gone"), lambda: CommandError("\ud800"), lambda: KeyError(nested(100_000)),
]  # fmt: skip
_WORDS = ANY_TEXTS | _named(empty="", large="x" * 5000, long=10**5000, none=None, nobody=Nobody(), text=Text("t"))
_VERDICTS = st.sampled_from([TransientCommandError, PermanentCommandError, BusinessRuleError])
_FAILURES = st.builds(lambda kind, *words: kind(*words), _VERDICTS, _WORDS, _WORDS, VALUES)
EXCEPTIONS = _FAILURES | st.sampled_from(_ODD_EXCEPTIONS).map(lambda make: make()) | ANY_TEXTS.map(ValueError)


@st.composite
def _cases(draw: st.DrawFn) -> Case:
    if draw(st.booleans()):
        return Case(draw(_FITTING), result=draw(VALUES))
    return Case(draw(_FITTING), error=draw(EXCEPTIONS))


CASES = _cases()

# -- what another language sends ---------------------------------------------------------------------------------------

_TEXT_OF_NUMBERS = [
    "1e5000", "-1e4999", "1e400", "1.5e400", "5e-324", "1e-5000", "-0", "-0.0", "1E+2", f"1{'0' * 4300}.5", "9" * 4301,
    f"0.{'1' * 5000}", "18446744073709551616", "1e131072", "1e400000", "NaN", "01", "+1", ".5",
]  # fmt: skip
_TEXT_OF_STRINGS = [
    r'"\u0000"',
    r'"\ud800"',
    r'"\ud83d\ude00"',
    r'"\u001b[2J"',
    r'"\u2028"',
    '"\x1b"',
    '"\x9b31m"',
    '"\\x"',
    '"',
]
JSON_TEXTS = st.recursive(
    st.sampled_from(
        [*_TEXT_OF_NUMBERS, *_TEXT_OF_STRINGS, "null", "true", ' { "a" : 1 , "a" : 2 } ', "", "nul", "[1,]"]
    )
    | GOOD_TEXTS.map(json.dumps)
    | GOOD_TEXTS.map(lambda text: json.dumps(text, ensure_ascii=False)),
    lambda inner: (
        inner.map(lambda text: f"[1, {text}]")
        | st.tuples(GOOD_TEXTS.map(json.dumps), inner).map(lambda pair: f"{{{pair[0]}: {pair[1]}}}")
        | st.tuples(st.sampled_from([62, 63, 64, 65, 1000, 20_000]), inner).map(
            lambda of: "[" * of[0] + of[1] + "]" * of[0]
        )
    ),
    max_leaves=3,
)
