"""What may be sent: the fast checks find what a plain look at every value finds, and the message names the path."""

from __future__ import annotations

import enum
import json
import math
import re
import sys
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any, NamedTuple
from uuid import UUID

import pytest
from hypothesis import given

from commandbus import InvalidCommandError, SendRequest, _calls, _desk_calls
from commandbus._limits import encode
from tests.support import nested
from tests.values import VALUES, Colour, Size

OWN = UUID(int=7)


class Point(NamedTuple):
    x: int
    y: int


FAULTS: list[tuple[object, str]] = [
    ({"items": [1, 2, {"price": float("nan")}]}, ".items[2].price is not a finite number"),
    (float("-inf"), " is not a finite number"),
    ([{1, 2}], "[0] is of the class set"),
    ({"at": object()}, ".at is of the class object"),
    ({"a": b"x"}, ".a is of the class bytes"),
    ({"a": {7: "x"}}, ".a has a key of the class int"),
    ({"a": [{True: "x"}]}, ".a[0] has a key of the class bool"),
    ({None: "x"}, " has a key of the class NoneType"),
    ({1.5: "x"}, " has a key of the class float"),
    ({Size.LARGE: "x"}, " has a key of the class Size"),
    ({(1, 2): "x"}, " has a key of the class tuple"),
    ({"a": "x\0y"}, ".a has a NUL character"),
    ({"a": {"x\0y": 1}}, ".a has a key that has a NUL character"),
    (["\ud800"], "[0] has a lone surrogate"),
    (["\ud83d\ude00"], "[0] has a lone surrogate"),
    ({"\udfff": 1}, " has a key that has a lone surrogate"),
    ({"n": 10**4300}, ".n is an integer of more than 4,300 digits"),
    ({"n": -(10**4300)}, ".n is an integer of more than 4,300 digits"),
    (nested(65), "[0]" * 64 + " is nested deeper than 64 levels"),
    (nested(100_000), "[0]" * 64 + " is nested deeper than 64 levels"),
    ({"with space": {"x": [None, {"ü": math.inf}]}}, r'["with space"].x[1]["\u00fc"] is not a finite number'),
    ({"a\n\x1b": math.inf}, r'["a\n\u001b"] is not a finite number'),
]


@pytest.mark.parametrize(("value", "problem"), FAULTS, ids=[str(n) for n in range(len(FAULTS))])
def test_a_fault_is_told_with_its_path(value: object, problem: str) -> None:
    with pytest.raises(InvalidCommandError) as caught:
        _calls.outgoing(SendRequest("d", "A", value), {}, OWN)
    assert str(caught.value).startswith(f"command {OWN}: data{problem}")


def test_what_contains_itself_is_nested_too_deep() -> None:
    endless: list[Any] = []
    endless += [endless, endless]
    with pytest.raises(InvalidCommandError, match="nested deeper"):
        encode(endless, "data")


def test_an_integer_is_refused_also_where_python_would_write_it() -> None:
    before = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(0)
    try:
        with pytest.raises(InvalidCommandError, match=r"data\[1\] is an integer of more than 4,300 digits"):
            encode([1, 10**4300], "data")
        assert encode(10**4300 - 1, "data") == "9" * 4300
        assert encode("9" * 5000, "data") == f'"{"9" * 5000}"'
    finally:
        sys.set_int_max_str_digits(before)


def test_a_long_path_is_cut_off() -> None:
    with pytest.raises(InvalidCommandError) as caught:
        encode({"k" * 5000: {"l" * 5000: math.inf}}, "data")
    assert str(caught.value).startswith(f"data.{'k' * 199}... is not a finite number")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (Size.LARGE, "3"),
        (Colour.RED, '"red"'),
        ({Colour.RED: (1, Point(2, 3))}, '{"red":[1,[2,3]]}'),
        (OrderedDict(a=1), '{"a":1}'),
        ({"1": "true", "null": {"-1.5": {"true": "}"}}}, '{"1":"true","null":{"-1.5":{"true":"}"}}}'),
        ("\\u0000 \\ud800", r'"\\u0000 \\ud800"'),
        ("😀 한", r'"\ud83d\ude00 \ud55c"'),
        (nested(64), "[" * 64 + "]" * 64),
        ([[Colour.RED]] * 70, '[["red"]' + ',["red"]' * 69 + "]"),
    ],
    ids=repr,
)
def test_what_json_dumps_takes_is_taken(value: object, text: str) -> None:
    assert encode(value, "data") == text


@pytest.mark.parametrize(
    ("value", "size"),
    [
        ("x" * 1022, 1024),
        ("ü" * 511, 1024),
        (["a", {"b": 1}], 15),
        ([5e-324], 328),
        ([1.5e300, -1e16], 301 + 18 + 4),
        ([-0.0, 0.25, 100.0], 18),
        (["1e-5 and 1e+5"], 17),
    ],
    ids=repr,
)
def test_the_size_is_that_of_the_text_that_postgresql_writes(value: object, size: int) -> None:
    encode(value, "data", size)
    with pytest.raises(
        InvalidCommandError, match=re.escape(f"data has {size:,} bytes as JSON text, at most {size - 1:,}")
    ):
        encode(value, "data", size - 1)


# -- the fast checks against a plain one -------------------------------------------------------------------------------


def _parts(value: object, depth: int = 0) -> Iterator[tuple[object, int]]:
    """Everything in a value, keys too, with its depth."""
    yield value, depth
    if isinstance(value, dict):
        for key, inner in value.items():
            yield ("a key", key), -1
            yield from _parts(inner, depth + 1)
    elif isinstance(value, list):
        for inner in value:
            yield from _parts(inner, depth + 1)


def _is_fine(part: object, depth: int) -> bool:
    if depth == -1:
        assert isinstance(part, tuple)
        return isinstance(part[1], str) and _is_fine(part[1], 0)
    match part:
        case dict() | list():
            return depth < 64
        case str():
            return not any(char == "\0" or "\ud800" <= char <= "\udfff" for char in part)
        case float():
            return math.isfinite(part)
        case int():
            return abs(part) < 10**4300
        case _:
            return part is None


_PATH = r'^data(\.\w+|\[\d+\]|\["([^"\\]|\\.)*"\])*(\.\.\.)? (is|has) '


@given(VALUES)
def test_what_passes_is_what_is_within_the_limits(value: object) -> None:
    fine = all(_is_fine(part, depth) for part, depth in _parts(value))
    if not fine:
        with pytest.raises(InvalidCommandError, match=_PATH):
            encode(value, "data")
        return
    text = encode(value, "data")
    assert text.isascii()
    assert json.loads(text) == value


# -- the other fields --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "good", "bad", "problem"),
    [
        ("correlation_id", "x" * 256, "x" * 257, "correlation_id must be a string of at most 256 characters"),
        ("correlation_id", "😀", "\ud800", "correlation_id has a lone surrogate"),
        ("correlation_id", "", "\0", "correlation_id has a NUL character"),
        ("reply_to", "r" * 128, "r" * 129, "reply_to is '"),
        ("headers", {"a": "x" * 8183}, {"a": "x" * 8184}, "headers has 8,193 bytes"),
        ("headers", {"a": ""}, {"a": "\0"}, "headers.a has a NUL character"),
        ("headers", {"a": ""}, {"a": None}, "headers must map strings to strings"),
        ("headers", {"a": ""}, {"a": []}, "headers must map strings to strings"),
        ("headers", {"a": ""}, {1: "a"}, "headers has a key of the class int"),
        ("headers", {"a": ""}, {"\ud800": "a"}, "headers has a key that has a lone surrogate"),
    ],
)
def test_a_field_at_its_limit_and_one_beyond(field: str, good: Any, bad: Any, problem: str) -> None:  # noqa: ANN401
    def send(value: Any) -> None:  # noqa: ANN401 - of any field
        given: dict[str, Any] = {} if field == "headers" else {field: value}
        _calls.outgoing(SendRequest("d", "A", 1, **given), value if field == "headers" else {}, OWN)

    send(good)
    with pytest.raises(InvalidCommandError) as caught:
        send(bad)
    assert str(caught.value).startswith(f"command {OWN}: {problem}")


def test_a_name_of_an_enumeration_is_its_value() -> None:
    class Domain(str, enum.Enum):  # noqa: UP042 - unlike StrEnum, it does not format as its value
        SHOP = "shop"

    outgoing = _calls.outgoing(SendRequest(Domain.SHOP, Colour.RED, 1, priority=Size.LARGE), {}, OWN)
    row = {"domain": "shop", "command_type": "red", "command_id": str(OWN), "data": 1, "priority": 3}
    assert json.loads(outgoing.text) == row


@pytest.mark.parametrize("field", ["operator", "reason"])
def test_the_words_of_an_operator_have_no_nul(field: str) -> None:
    words = {"operator": "ana", "reason": "why"} | {field: "a\0b"}
    with pytest.raises(InvalidCommandError, match=f"command {OWN}: {field} has a NUL"):
        _desk_calls.cancel("d", OWN, **words)
    with pytest.raises(InvalidCommandError, match=f"{field} has a NUL"):
        _desk_calls.operator_bulk("d", "cancel", [(OWN, 1)], **words, value=None)


class Mute(str):
    """A text that does not tell itself."""

    __slots__ = ()

    def __str__(self) -> str:
        raise RuntimeError("no text")


def test_a_path_tells_a_key_whatever_its_class_does() -> None:
    assert encode({Mute("k"): [[[]]] * 40}, "data") == json.dumps({"k": [[[]]] * 40}, separators=(",", ":"))
    with pytest.raises(InvalidCommandError, match=r"data\.k is not a finite number"):
        encode({Mute("k"): math.inf}, "data")
