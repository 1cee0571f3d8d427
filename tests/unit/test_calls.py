"""The protocol as values: what is executed, and how the answer is read."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from uuid import UUID, uuid4

import pytest

from commandbus import CommandStatus, InvalidCommandError, SendRequest, _calls
from commandbus._calls import Claimed, Outgoing

NOW = datetime(2026, 1, 1, tzinfo=UTC)
FRESH = UUID(int=7)


def outgoing(request: SendRequest, headers: dict[str, str] | None = None) -> Outgoing:
    """The request, checked and serialised."""
    return _calls.outgoing(request, headers or {}, FRESH)


def sent(request: SendRequest, headers: dict[str, str] | None = None) -> dict[str, object]:
    """The row that this request becomes."""
    row: dict[str, object] = json.loads(outgoing(request, headers).text)
    return row


def test_a_request_becomes_a_row_of_what_was_given() -> None:
    row = sent(SendRequest("d", "A", {"n": 1}))
    assert row == {"domain": "d", "command_type": "A", "data": {"n": 1}, "command_id": str(FRESH)}


def test_every_option_is_in_the_row() -> None:
    own = uuid4()
    request = SendRequest(
        "d",
        "A",
        [],
        command_id=own,
        correlation_id="c",
        reply_to="r",
        max_attempts=2,
        delay=timedelta(seconds=1.5),
        priority=-3,
    )
    assert sent(request, {"h": "v"}) == {
        "domain": "d",
        "command_type": "A",
        "data": [],
        "command_id": str(own),
        "correlation_id": "c",
        "reply_to": "r",
        "max_attempts": 2,
        "delay": 1.5,
        "priority": -3,
        "headers": {"h": "v"},
    }


def test_a_row_that_is_looked_up_says_so() -> None:
    one = outgoing(SendRequest("d", "A", {}))
    assert json.loads(one.row(minted=True)) == json.loads(one.text) | {"minted": True}
    assert json.loads(one.row(minted=False)) == json.loads(one.text)
    assert one.minted
    assert not outgoing(SendRequest("d", "A", {}, command_id=uuid4())).minted


def test_text_is_ascii_whatever_the_data() -> None:
    text = outgoing(SendRequest("d", "A", {"ä": "😀\u2028"})).text
    assert text.isascii()
    assert json.loads(text)["data"] == {"ä": "😀\u2028"}


def test_an_error_names_the_command_and_the_field_and_hides_the_data() -> None:
    own = uuid4()
    with pytest.raises(InvalidCommandError) as caught:
        outgoing(SendRequest("d", "A", {"password": "secret", "x": object()}, command_id=own))
    assert str(own) in str(caught.value)
    assert "data" in str(caught.value)
    assert "secret" not in str(caught.value)


def test_a_send_is_one_statement_with_one_text() -> None:
    call = _calls.send(['{"a":1}', '{"a":2}'], 50)
    assert call.sql.count("%s") == len(call.params)
    assert json.loads(str(call.params[0])) == [{"a": 1}, {"a": 2}]
    assert call.read([("accepted",), ("duplicate",)]) == ["accepted", "duplicate"]


def test_a_round_reads_what_is_undone_then_commands_and_then_the_last_row() -> None:
    token, command_id = uuid4(), uuid4()
    row = (command_id, "A", "{}", "{}", None, None, 0, None, 0, 0, 1, token, 7, NOW)
    call = _calls.work("d", [("A", -1, 5)], 10, "w", timedelta(seconds=60), completions=["{}", "{}"], sweep=True)
    assert call.sql.count("%s") == len(call.params)
    assert call.params[1] == "[{},{}]"
    work = call.read([(token, *[None] * 15, "busy"), (*row, None, None, None), (*[None] * 14, 2.5, True, None)])
    assert work.undone == {token: "busy"}
    assert work.next_due == timedelta(seconds=2.5)
    assert work.alone_waiting
    (found,) = work.commands
    assert (found.domain, found.command_id, found.lease_token, found.place) == ("d", command_id, token, 7)
    empty = call.read([(*[None] * 14, None, False, None)])
    assert (empty.commands, empty.undone, empty.next_due, empty.alone_waiting) == ([], {}, None, False)


def claimed(data: str, headers: str = "{}") -> Claimed:
    """A claimed command with this text as data."""
    return Claimed("d", uuid4(), "A", data, headers, None, None, 0, None, 2, 1, 4, uuid4(), 7, NOW)


def test_a_claimed_command_is_decoded_late() -> None:
    command = claimed('{"a": 1}', '{"h": "v"}').command("w")
    assert (command.data, command.headers, command.worker) == ({"a": 1}, {"h": "v"}, "w")
    assert (command.status, command.attempts, command.crashes, command.delivery) == (CommandStatus.IN_PROGRESS, 2, 1, 4)


@pytest.mark.parametrize("text", ["1" * 5001, "[" * 100_000 + "]" * 100_000], ids=["long", "deep"])
def test_what_cannot_be_decoded_raises_then(text: str) -> None:
    with pytest.raises((ValueError, RecursionError)):
        claimed(text).command("w")


def test_a_lease_is_named_by_command_delivery_and_token() -> None:
    command_id, token = uuid4(), uuid4()
    item = json.loads(_calls.held(command_id, 3, token, ',"result":{"a":1}'))
    assert item == {"command_id": str(command_id), "delivery": 3, "lease_token": str(token), "result": {"a": 1}}


def test_the_verbs_of_a_lease_answer_by_command() -> None:
    one, two = uuid4(), uuid4()
    items = [_calls.held(one, 1, uuid4()), _calls.held(two, 1, uuid4())]
    calls = [
        _calls.renew("d", items, timedelta(seconds=60)),
        _calls.complete("d", items),
        _calls.fail("d", items),
        _calls.release("d", items),
    ]
    for call, name in zip(calls, ("renew", "complete", "fail", "release"), strict=True):
        assert f"commandbus.{name}_v" in call.sql
        assert call.sql.count("%s") == len(call.params)
        assert len(json.loads(str(call.params[1]))) == 2
        assert call.read([(one, "done"), (two, "lost")]) == {one: "done", two: "lost"}
