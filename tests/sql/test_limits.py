"""Every limit of what may be given, at its edge and one beyond, through plain SQL; and what passes in Python passes."""

from __future__ import annotations

import json
from typing import Any
from uuid import uuid4

import psycopg
import pytest
from hypothesis import HealthCheck, given, settings

from commandbus import InvalidCommandError, SendRequest, _calls
from commandbus._limits import _size, encode
from tests.sql.support import Connection, Row, arrange, everything, one, rows, send, send_ids, sqlstate
from tests.support import nested
from tests.values import VALUES

DEFAULT = 262_144
OWN = "11111111-1111-4111-8111-111111111111"


@pytest.fixture
def dsn(emptied_dsn: str) -> str:
    return emptied_dsn


def text_of(size: int) -> str:
    """A string that has so many bytes as JSON."""
    return "x" * (size - 2)


def deep(depth: int, inner: object = None) -> object:
    """Lists and objects in turn, so many, around a value."""
    value = inner
    for n in range(depth):
        value = {"k": value} if n % 2 else [value]
    return value


def refused(db: Connection, **fields: object) -> str:
    """What is said of a command with these fields; nothing is written, and nothing of a neighbour."""
    with pytest.raises(psycopg.Error) as caught:
        send(db, {}, {"command_id": OWN, **fields}, {})
    assert caught.value.sqlstate == "CB001"
    assert everything(db) == []
    return f"{caught.value.diag.message_primary}. {caught.value.diag.message_hint}"


def allow(db: Connection, size: int) -> None:
    db.execute("UPDATE commandbus.setting SET value = %s WHERE name = 'max_data_bytes'", [str(size)])


@pytest.fixture(params=[1024, DEFAULT, 1 << 20])
def limit(request: pytest.FixtureRequest, db: Connection) -> Any:  # noqa: ANN401 - a generator
    allow(db, request.param)
    yield request.param
    allow(db, DEFAULT)


def test_the_default_is_256_kib(db: Connection) -> None:
    assert rows(db, "SELECT * FROM commandbus.limits_v1()") == [(DEFAULT,)]


@pytest.mark.parametrize("size", [1023, (1 << 20) + 1])
def test_the_owner_chooses_between_1_kib_and_1_mib(db: Connection, size: int) -> None:
    with pytest.raises(psycopg.errors.CheckViolation):
        allow(db, size)


def test_without_the_setting_the_default_holds(db: Connection) -> None:
    with db.transaction(force_rollback=True):
        db.execute("DELETE FROM commandbus.setting WHERE name = 'max_data_bytes'")
        assert one(db, "SELECT max_data_bytes FROM commandbus.limits_v1()") == DEFAULT
        send_ids(db, data=text_of(DEFAULT))
        assert sqlstate(lambda: send(db, data=text_of(DEFAULT + 1))) == "CB001"


def test_data_at_the_limit_and_one_byte_beyond(db: Connection, limit: int) -> None:
    said = refused(db, data=text_of(limit + 1))
    assert said.startswith(f"command {OWN}: data is missing or out of bounds. Nothing was sent")
    assert f"({limit})" in said
    send_ids(db, data=text_of(limit))


@pytest.mark.parametrize(
    ("value", "size"), [("ü" * 600, 1202), ([1] * 400, 1200), ({"a": [5e-324] * 4}, 1319), (1e300, 301)], ids=repr
)
def test_what_counts_is_the_text_as_postgresql_writes_it(db: Connection, value: object, size: int) -> None:
    (command_id,) = send_ids(db, data=value)
    sql = "SELECT octet_length(data::text) FROM commandbus.command WHERE command_id = %s"
    assert one(db, sql, command_id) == size == _size(value)


def test_how_it_is_spelled_does_not_count(db: Connection) -> None:
    sql = "SELECT outcome FROM commandbus.send_v1(%s)"
    row = '[{"domain":"d","command_type":"A","data":%s}]'
    assert one(db, sql, row % (" " * DEFAULT + "1")) == "accepted"
    assert one(db, sql, row % "[1e131000, 1e131000]") == "accepted"
    assert sqlstate(lambda: db.execute(sql, [row % "[1e131000, 1e131000, 1e131000]"])) == "CB001"


@pytest.mark.parametrize("inner", [None, "x", [], {}, [1, {"a": 2}], text_of(2000)], ids=lambda value: str(value)[:9])
def test_depth_at_the_limit_and_one_beyond(db: Connection, inner: object) -> None:
    own = 0 if isinstance(inner, str) or inner is None else 2 if inner else 1
    assert refused(db, data=deep(65 - own, inner)).startswith(f"command {OWN}: data is missing or out of bounds")
    assert "64 levels" in refused(db, data={"a": [0] * 500, "b": deep(64 - own, inner)})
    send_ids(db, data=deep(64 - own, inner))
    send_ids(db, data={"a": [0] * 500, "b": deep(63 - own, inner)})


def test_brackets_in_a_text_are_no_depth(db: Connection) -> None:
    send_ids(db, data={"a": "[" * 100, "{{{{" * 50: 1})


@pytest.mark.parametrize(
    ("field", "good", "bad"),
    [
        ("domain", "d" * 128, "d" * 129),
        ("command_type", "a" * 128, "a" * 129),
        ("reply_to", "r" * 128, "r" * 129),
        ("reply_to", "a.b:c_d-E9", "a b"),
        ("correlation_id", "ü" * 256, "u" * 257),
        ("headers", {"a": "x" * 8183}, {"a": "x" * 8184}),
        ("headers", {"a": "ü" * 4091}, {"a": "ü" * 4092}),
        ("headers", {"a": ""}, {"a": None}),
        ("headers", {}, {"a": {}}),
    ],
    ids=str,
)
def test_a_field_at_its_limit_and_one_beyond(db: Connection, field: str, good: object, bad: object) -> None:
    assert refused(db, **{field: bad}).startswith(f"command {OWN}: {field} is missing or out of bounds")
    send_ids(db, **{field: good})


@pytest.mark.parametrize("text", ["\0", "\ud800"], ids=["NUL", "a lone surrogate"])
@pytest.mark.parametrize("field", ["data", "headers", "correlation_id"])
def test_what_is_no_text_for_postgresql_is_a_data_error(db: Connection, field: str, text: str) -> None:
    row: Row = {field: {"a": text} if field != "correlation_id" else text}
    assert sqlstate(lambda: send(db, row))[:2] == "22"
    assert everything(db) == []


# -- operators ---------------------------------------------------------------------------------------------------------

RETRY = "SELECT commandbus.operator_retry_v1('d', %s, 'ana', 'why', %s)"
COMPLETE = "SELECT commandbus.operator_complete_v1('d', %s, 'ana', 'why', %s)"
EDGES: list[tuple[str, str, object, object]] = [
    (RETRY, "data", text_of(DEFAULT), text_of(DEFAULT + 1)),
    (RETRY, "data", deep(64), deep(65)),
    (COMPLETE, "result", text_of(1 << 20), text_of((1 << 20) + 1)),
    (COMPLETE, "result", nested(64), nested(65)),
]


@pytest.mark.parametrize(("verb", "field", "good", "bad"), EDGES, ids=["data", "deep data", "result", "deep result"])
def test_an_operators_json_at_its_limit_and_one_beyond(
    db: Connection, verb: str, field: str, good: object, bad: object
) -> None:
    command_id = arrange(db, "IN_TROUBLESHOOTING_QUEUE")["command_id"]
    before = everything(db)
    with pytest.raises(psycopg.Error, match=f"command {command_id}: {field} is out of bounds") as caught:
        db.execute(verb.encode(), [command_id, json.dumps(bad)])
    assert caught.value.sqlstate == "CB001"
    assert everything(db) == before
    db.execute(verb.encode(), [command_id, json.dumps(good)])
    assert everything(db) != before


def test_an_edit_obeys_the_setting(db: Connection, limit: int) -> None:
    command_id = arrange(db, "IN_TROUBLESHOOTING_QUEUE")["command_id"]
    assert sqlstate(lambda: db.execute(RETRY, [command_id, json.dumps(text_of(limit + 1))])) == "CB001"
    db.execute(RETRY, [command_id, json.dumps(text_of(limit))])


# -- Python and SQL agree ----------------------------------------------------------------------------------------------


def _same(sent: Any, back: Any) -> bool:  # noqa: ANN401 - any JSON
    """Whether this is what was sent: a large float comes back as the integer of its digits."""
    match sent:
        case dict():
            return sent.keys() == back.keys() and all(_same(inner, back[key]) for key, inner in sent.items())
        case list():
            return len(sent) == len(back) and all(map(_same, sent, back))
        case float():
            return bool(float(back) == sent)
        case _:
            return bool(sent == back)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(VALUES)
def test_what_passes_in_python_passes_here_and_comes_back(db: Connection, value: object) -> None:
    try:
        outgoing = _calls.outgoing(SendRequest("d", "A", value), {}, uuid4())
    except InvalidCommandError:
        return
    assert rows(db, "SELECT outcome FROM commandbus.send_v1(%s)", f"[{outgoing.text}]") == [("accepted",)]
    sql = "SELECT data::text, octet_length(data::text) FROM commandbus.command WHERE command_id = %s"
    ((text, size),) = rows(db, sql, outgoing.command_id)
    assert _same(value, json.loads(text))
    assert size == _size(value)
    assert encode(value, "data", size)
