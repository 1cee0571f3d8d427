"""Hostile payloads through send, handlers, errors and reading, in both halves.

What is refused is refused with `InvalidCommandError`, what is accepted comes back as it was sent, and whatever a
handler makes of it can be recorded and read.
"""

from __future__ import annotations

import base64
import contextlib
import json
from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import Any, cast
from uuid import UUID

import psycopg
import pytest
from hypothesis import given
from hypothesis import strategies as st

from commandbus import (
    BusinessRuleError,
    Command,
    CommandBusError,
    CommandError,
    CommandStatus,
    InvalidCommandError,
    PermanentCommandError,
    SendRequest,
    TransientCommandError,
    TroubleshootingFilter,
    TroubleshootingQueue,
)
from commandbus._limits import MAX_BYTES
from tests.bus.support import Connection, one, rows
from tests.faults.payloads import (
    ANY_TEXTS,
    ASYNC,
    BAD_COMMANDS,
    CASES,
    DOMAIN,
    JSON_TEXTS,
    MAX_DATA,
    VALUES,
    WORDS,
    Case,
    Mute,
    as_stored,
    fits,
    same,
)
from tests.faults.stage import EACH, LONG, SAMPLE, Stage, fuzzed
from tests.support import direct_only
from tests.worker.support import PARKED

VERDICTS = (TransientCommandError, PermanentCommandError, BusinessRuleError)
ID = UUID(int=7)

lengths = pytest.mark.parametrize("examples", [SAMPLE, pytest.param(LONG, marks=pytest.mark.long)])


@direct_only
@lengths
def test_what_is_accepted_comes_back_and_ends_as_its_handler_says(
    stage: Stage, examples: int, request: pytest.FixtureRequest
) -> None:
    @fuzzed(request.config, examples)
    @given(st.lists(CASES, min_size=EACH, max_size=EACH), st.booleans())
    def play(cases: list[Case], as_batch: bool) -> None:  # noqa: FBT001 - Hypothesis gives it
        commands = stage.runner.run(stage.play(cases, as_batch=as_batch))
        for case, command in zip(cases, commands, strict=True):
            check_sent(case, stage.seen[command.reply_to], command)
            check_ending(case, command)

    play()


def check_sent(case: Case, seen: Command, read: Command) -> None:
    """What the handler saw, and what is read of it now, is what was sent."""
    sent = {"correlation_id": None, "max_attempts": None, "priority": 0, "headers": {}} | case.given
    for command in seen, read:
        assert same(command.data, as_stored(sent["data"])), case
        assert same(command.headers, as_stored(sent["headers"])), case
        assert command.correlation_id == sent["correlation_id"], case
        assert (command.max_attempts, command.priority) == (sent["max_attempts"], sent["priority"]), case


def check_ending(case: Case, command: Command) -> None:
    """The handler's verdict stands, with its words as far as they can be kept."""
    error = case.error
    if error is None:
        assert command.status == CommandStatus.COMPLETED, case
        if fits(case.result, MAX_BYTES, any_keys=True):
            assert same(command.result, as_stored(case.result)), case
        else:
            assert command.result["commandbus"] == "result replaced", case
        return
    assert command.status == (CommandStatus.FAILED if isinstance(error, BusinessRuleError) else PARKED), case
    assert command.error is not None, case
    assert len(command.error.code) <= 128, case
    assert len(command.error.message) <= 4096, case
    if type(error) in VERDICTS:
        assert isinstance(error, CommandError)
        if type(error.code) is str and 0 < len(error.code) <= 128 and fits(error.code):
            assert command.error.code == error.code, case
        if type(error.message) is str and len(error.message) <= 4096 and fits(error.message):
            assert command.error.message == error.message, case
        if fits(error.details, 1024, any_keys=True):
            assert same(command.error.details, as_stored(error.details)), case


@direct_only
@lengths
def test_what_is_refused_is_refused_by_type_and_nothing_is_written(
    stage: Stage, examples: int, request: pytest.FixtureRequest
) -> None:
    @fuzzed(request.config, examples)
    @given(st.lists(BAD_COMMANDS, min_size=EACH, max_size=EACH), CASES)
    def refuse(bad: list[Case], good: Case) -> None:
        async def send() -> None:
            for case in bad:
                with pytest.raises(InvalidCommandError) as caught:
                    await stage.bus.send(**case.given)
                assert str(caught.value).isprintable()
                assert len(str(caught.value)) < 1000
                with pytest.raises(InvalidCommandError):
                    await stage.bus.send_batch([SendRequest(**good.given), SendRequest(**case.given)])

        stage.runner.run(send())

    refuse()
    assert one(stage.db, "SELECT count(*) FROM commandbus.commands") == 0


@direct_only
@lengths
def test_what_another_language_sends_is_refused_handled_or_parked_as_unreadable(
    stage: Stage, examples: int, request: pytest.FixtureRequest
) -> None:
    @fuzzed(request.config, examples)
    @given(st.lists(JSON_TEXTS, min_size=EACH, max_size=EACH))
    def send(texts: list[str]) -> None:
        sent = {command_id: text for text in texts if (command_id := send_in_sql(stage.db, text))}
        stage.runner.run(stage.play([], as_batch=True))
        for command_id in sent:
            command = stage.runner.run(stage.bus.get_command(DOMAIN, command_id))
            (stored,) = rows(stage.db, "SELECT data::text FROM commandbus.commands WHERE command_id = %s", command_id)
            try:
                data = json.loads(stored[0])
            except ValueError:
                assert command.status == PARKED, stored
                assert command.error is not None, stored
                assert command.error.code == "UNREADABLE", stored
            else:
                assert command.status == CommandStatus.COMPLETED, stored
                assert same(command.data, data), stored

    send()


def send_in_sql(db: Connection, data: str) -> UUID | None:
    """Send data as another language would; None if PostgreSQL refuses them."""
    try:
        text = f'[{{"domain":"{DOMAIN}","command_type":"{ASYNC}","data":{data}}}]'
        return cast("UUID", one(db, "SELECT command_id FROM commandbus.send_v1(%s)", text))
    except psycopg.Error as error:
        if (error.sqlstate or "")[:2] not in {"22", "54", "CB"}:
            raise
        return None


# -- people ------------------------------------------------------------------------------------------------------------

ASKING: dict[str, Callable[[Any, str], Awaitable[object]]] = {
    "get_command": lambda bus, text: bus.get_command(text, ID),
    "get_audit_trail": lambda bus, text: bus.get_audit_trail(text, ID),
    "explain": lambda bus, text: bus.explain(text, ID),
    "cancel": lambda bus, text: bus.cancel(text, ID),
    "count": lambda bus, text: bus.count(domain=text, command_type=text),
    "stats": lambda bus, text: bus.stats(domain=text),
    "query_commands": lambda bus, text: bus.query_commands(domain=text, command_type=text),
    "status": lambda bus, text: bus.query_commands(status=text),
    "cursor": lambda bus, text: bus.query_commands(cursor=text),
    "cursor with": lambda bus, text: bus.query_commands(cursor=cursor_with(text)),
    "since": lambda bus, text: bus.query_commands(since=timedelta.max),
    "parked": lambda bus, text: TroubleshootingQueue(bus).list_troubleshooting(text, text=text),
    "preview": lambda bus, text: TroubleshootingQueue(bus).preview(
        TroubleshootingFilter(DOMAIN, error_code=text, fingerprint=text)
    ),
}


def cursor_with(text: str) -> str:
    return base64.urlsafe_b64encode(json.dumps([text, str(ID)]).encode()).decode()


@direct_only
@lengths
def test_a_question_with_hostile_words_has_an_answer_or_a_typed_error(
    stage: Stage, examples: int, request: pytest.FixtureRequest
) -> None:
    @fuzzed(request.config, 4 * examples)
    @given(st.sampled_from(sorted(ASKING)), ANY_TEXTS)
    def ask(name: str, text: str) -> None:
        async def answer() -> None:
            with contextlib.suppress(CommandBusError):
                await ASKING[name](stage.bus, text)

        stage.runner.run(answer())

    ask()


@direct_only
@lengths
def test_what_an_operator_says_and_edits_is_kept_or_refused(
    stage: Stage, examples: int, request: pytest.FixtureRequest
) -> None:
    acts = st.tuples(st.sampled_from(["retry", "cancel", "complete"]), WORDS, WORDS, VALUES)

    async def act(name: str, command: Command, operator: str, reason: str, value: object) -> None:
        queue = TroubleshootingQueue(stage.bus)
        more = {"retry": {"data": value}, "cancel": {}, "complete": {"result_data": value}}[name]
        allowed = operator != "" and fits(operator) and fits(reason)
        if allowed and (name == "cancel" or fits(value, MAX_DATA if name == "retry" else MAX_BYTES)):
            verb = getattr(queue, f"operator_{name}")
            await verb(DOMAIN, command.command_id, operator=operator, reason=reason, **more)
            now = await stage.bus.get_command(DOMAIN, command.command_id)
            trail = await stage.bus.get_audit_trail(DOMAIN, command.command_id)
            assert [(event.operator, event.reason) for event in trail if event.operator] == [(operator, reason)]
            if name == "retry":
                assert same(now.data, as_stored(value if value is not None else command.data))
            elif name == "complete":
                assert same(now.result, as_stored(value))
            return
        with pytest.raises(InvalidCommandError):
            await getattr(queue, f"operator_{name}")(
                DOMAIN, command.command_id, operator=operator, reason=reason, **more
            )

    async def act_on_many(operator: str, reason: str) -> None:
        queue = TroubleshootingQueue(stage.bus)
        count = await queue.count_troubleshooting(DOMAIN)
        try:
            await queue.operator_cancel_many(
                TroubleshootingFilter(DOMAIN), expected_count=count, operator=operator, reason=reason
            )
        except InvalidCommandError:
            await queue.operator_cancel_many(
                TroubleshootingFilter(DOMAIN), expected_count=count, operator="ana", reason="the words were refused"
            )

    @fuzzed(request.config, examples)
    @given(st.lists(acts, min_size=EACH // 2, max_size=EACH // 2), WORDS, WORDS)
    def operate(given: list[tuple[str, str, str, object]], operator: str, reason: str) -> None:
        parked = [Case({"domain": DOMAIN, "command_type": ASYNC, "data": 1}, error=Mute()) for _ in given]
        commands = stage.runner.run(stage.play(parked, as_batch=True))
        for one_act, command in zip(given, commands, strict=True):
            stage.runner.run(act(one_act[0], command, *one_act[1:]))
        stage.runner.run(stage.play([], as_batch=True))
        stage.runner.run(act_on_many(operator, reason))

    operate()
