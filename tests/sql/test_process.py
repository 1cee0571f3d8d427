"""What becomes of processes: each outcome, each race, each verb; and what `verify_v1` says when a row was changed."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from uuid import uuid4

import psycopg
import pytest

from commandbus import (
    Compensate,
    Finish,
    InvalidCommandError,
    PermanentCommandError,
    Process,
    ProcessReceipt,
    Reply,
    Send,
    Wait,
)
from commandbus._calls import complete, held
from commandbus._connections import adopt, drive_blocking
from commandbus._limits import MAX_DEPTH
from commandbus.process import Next, applying
from tests.processes.support import Connection, Hand
from tests.sql.support import Connect, background, one, rows, start_waiting

DAY = timedelta(days=1)


@dataclass
class Told:
    """The state of a trial: which replies it has seen."""

    seen: str = ""


class Trial(Process[Told], domain="trials", deadline=30 * DAY):
    """Three steps side by side, A, B and C, each with an undo; C may be undone also when it was cut off."""

    def start(self, state: Told) -> Next:
        return [
            Send("work", "A", undo=("work", "UndoA", None), deadline=DAY),
            Send("work", "B", undo=("work", "UndoB", None)),
            Send("work", "C", undo=("work", "UndoC", None), undo_if_canceled=True),
        ]

    def on_a(self, state: Told, reply: Reply) -> Next:
        return self._seen(state, "a", reply)

    def on_b(self, state: Told, reply: Reply) -> Next:
        return self._seen(state, "b", reply)

    def on_c(self, state: Told, reply: Reply) -> Next:
        return self._seen(state, "c", reply)

    def _seen(self, state: Told, name: str, reply: Reply) -> Next:
        state.seen += name
        if reply.failed:
            return Compensate(reply.error)
        return None if self.open else Finish(state.seen)


class Resting(Process[Told], domain="trials"):
    """Waits, beside a step."""

    def start(self, state: Told) -> Next:
        return [Wait(DAY, "rest"), Send("work", "A")]

    def on_rest(self, state: Told, reply: Reply) -> Next:
        state.seen += "rest"
        return Finish("rested")

    def on_a(self, state: Told, reply: Reply) -> Next:
        state.seen += "a"
        return Finish("worked") if reply.data == "enough" else None


class Stuck(Process[Told], domain="trials"):
    """Says nothing after its step."""

    def start(self, state: Told) -> Next:
        return Send("work", "A")


@pytest.fixture
def hand(db: Connection) -> Hand:
    return Hand(db, Trial, Resting, Stuck, Large)


@pytest.fixture
def trial(hand: Hand) -> ProcessReceipt:
    return hand.start(Trial, Told())


def ends(hand: Hand, process: ProcessReceipt) -> tuple[str, str | None, list[str]]:
    """Status, error, and what is undone, in order."""
    undone = [step.removeprefix("undo ") for step in hand.steps(process) if step.startswith("undo")]
    return (*hand.status(process), undone)


def seen(hand: Hand, process: ProcessReceipt) -> str:
    sql = "SELECT state ->> 'seen' FROM commandbus.processes WHERE process_id = %s"
    return str(one(hand.db, sql, process.process_id))


# ------------------------------------------------------------------------------------------- outcomes


def test_the_first_error_compensates_and_later_ones_change_nothing(hand: Hand, trial: ProcessReceipt) -> None:
    claimed = hand.claim("work", "B")
    hand.do("work", "A")
    hand.do("work", "C", "refuse")
    hand.apply(2)
    assert hand.status(trial) == ("COMPENSATING", "NO")
    assert hand.pending() == [], "B runs: it is awaited, and nothing is undone yet"
    lease = held(claimed.command_id, claimed.delivery, claimed.lease_token, ',"result":null')
    hand.own.execute(complete("work", [lease]))
    hand.apply()
    hand.settle()
    assert ends(hand, trial) == ("COMPENSATED", "NO", ["b COMPLETED", "a COMPLETED"])
    assert seen(hand, trial) == "ac", "no method is asked while it is compensated"


def test_what_completed_last_is_undone_first_one_after_the_other(hand: Hand, trial: ProcessReceipt) -> None:
    for name in ("C", "A"):
        hand.do("work", name)
    hand.apply(2)
    hand.do("work", "B", "refuse")
    hand.apply()
    assert hand.pending() == [("work", "UndoA")]
    hand.do("work", "UndoA")
    assert hand.pending() == [("trials", "Reply")]
    hand.apply()
    assert hand.pending() == [("work", "UndoC")]
    hand.settle()
    assert ends(hand, trial) == ("COMPENSATED", "NO", ["a COMPLETED", "c COMPLETED"])


@pytest.mark.parametrize("how", ["refuse", "cancel"])
def test_an_undo_that_fails_holds_up_no_other(hand: Hand, trial: ProcessReceipt, how: str) -> None:
    for name in ("A", "C"):
        hand.do("work", name)
    hand.apply(2)
    hand.do("work", "B", "refuse")
    hand.apply()
    if how == "refuse":
        hand.do("work", "UndoC", "refuse")
    else:
        hand.park_and("cancel", "work", "UndoC")
    hand.apply()
    hand.settle()
    first = "c FAILED" if how == "refuse" else "c CANCELED"
    assert ends(hand, trial) == ("FAILED", "NO", [first, "a COMPLETED"])


_LARGE = {"text": "x" * 2000}
_LOWER = "UPDATE commandbus.setting SET value = '1024' WHERE name = 'max_data_bytes'"


class Large(Process[Told], domain="trials"):
    """Its undo has more data than its step, and options."""

    def start(self, state: Told) -> Next:
        undo = Send("work", "UndoA", _LARGE, delay=DAY, priority=7, max_attempts=3)
        return [Send("work", "A", undo=undo), Send("work", "B", undo=("work", "UndoB", None))]


def test_an_undo_that_could_not_be_sent_is_refused_with_its_step(hand: Hand) -> None:
    hand.db.execute(_LOWER)
    with pytest.raises(InvalidCommandError, match=r"the undo of a .*\(1024\)"):
        hand.start(Large, Told())
    assert one(hand.db, "SELECT count(*) FROM commandbus.processes") == 0


def test_an_undo_is_sent_as_it_was_given_whatever_is_allowed_by_now(hand: Hand) -> None:
    process = hand.start(Large, Told())
    hand.do("work", "A")
    hand.db.execute(_LOWER)
    verb(hand, "cancel", process.process_id)
    hand.apply(2)
    undo = "SELECT status, data, headers, priority, max_attempts, correlation_id, reply_to, due_at - sent_at"
    assert rows(hand.db, f"{undo} FROM commandbus.commands WHERE command_type = 'UndoA'") == [
        ("SCHEDULED", _LARGE, {}, 7, 3, str(process.process_id), "trials", DAY)
    ]
    hand.wait(2 * DAY)
    hand.settle()
    assert ends(hand, process) == ("COMPENSATED", "CANCELED", ["a COMPLETED"])
    assert rows(hand.db, "SELECT violation FROM commandbus.verify_v1()") == []


def test_what_nobody_runs_is_canceled_when_compensation_begins(hand: Hand, trial: ProcessReceipt) -> None:
    hand.do("work", "B", "park")
    hand.do("work", "A", "refuse")
    hand.apply()
    hand.settle()
    assert ends(hand, trial) == ("COMPENSATED", "NO", []), "C was never begun: there is nothing to undo"
    assert [step for step in hand.steps(trial) if step.startswith("step")] == [
        "step a FAILED", "step b CANCELED", "step c CANCELED",
    ]  # fmt: skip


def test_what_was_cut_off_is_undone_if_it_says_so(hand: Hand, trial: ProcessReceipt) -> None:
    for name in ("B", "C"):
        hand.do("work", name, "park")
    hand.do("work", "A", "refuse")
    hand.apply()
    hand.settle()
    assert ends(hand, trial) == ("COMPENSATED", "NO", ["c COMPLETED"])


@pytest.mark.parametrize("how", ["by an operator", "by its deadline", "by another step"])
def test_a_parked_reply_shows_and_does_not_hold_up_compensation(hand: Hand, trial: ProcessReceipt, how: str) -> None:
    other = hand.start(Resting, Told())
    hand.do("work", "A")
    hand.do("trials", "Reply", "park")
    assert rows(hand.db, "SELECT process_id, parked FROM commandbus.processes ORDER BY 2 DESC") == [
        (trial.process_id, 1),
        (other.process_id, 0),
    ]
    if how == "by an operator":
        verb(hand, "cancel", trial.process_id)
    elif how == "by its deadline":
        hand.wait(31 * DAY)
    else:
        hand.do("work", "B", "refuse")
    hand.settle()
    status, _, undone = ends(hand, trial)
    assert status == "COMPENSATED"
    assert "a COMPLETED" in undone
    assert rows(hand.db, "SELECT violation FROM commandbus.verify_v1()") == []


def test_a_reply_that_comes_again_or_from_nowhere_does_nothing(hand: Hand, trial: ProcessReceipt) -> None:
    hand.do("work", "A")
    again = """SELECT commandbus.send_v1(jsonb_build_array(jsonb_build_object('domain', domain, 'command_type', 'Reply',
                   'data', data || %s))::text) FROM commandbus.command WHERE command_type = 'Reply' LIMIT 1"""
    hand.db.execute(again, ("{}",))
    hand.db.execute(again, (f'{{"command_id": "{uuid4()}"}}',))
    hand.apply(3)
    assert seen(hand, trial) == "a"
    assert hand.status(trial) == ("RUNNING", None)
    hand.settle()
    assert seen(hand, trial) == "abc"


@pytest.mark.parametrize("how", ["refused", "too late"])
def test_an_error_as_deep_as_is_allowed_is_passed_on(hand: Hand, trial: ProcessReceipt, how: str) -> None:
    """Each that wraps it adds levels of its own: the error, what is said of the deadline."""
    error = json.dumps({"code": "DEEP", "message": "", "details": json.loads("[" * MAX_DEPTH + "]" * MAX_DEPTH)})
    hand.do("work", "A", "refuse" if how == "refused" else "park", error=error)
    if how == "too late":
        hand.wait(2 * DAY)
        hand.apply()
    hand.apply()
    hand.settle()
    assert ends(hand, trial) == ("COMPENSATED", "DEEP" if how == "refused" else "DEADLINE", [])
    kept = one(hand.db, "SELECT error FROM commandbus.processes")
    assert json.loads(error) == (kept if how == "refused" else kept["details"])


def test_it_finishes_when_no_step_is_open(hand: Hand) -> None:
    process = hand.start(Resting, Told())
    hand.wait(2 * DAY)
    hand.apply()
    assert hand.status(process) == ("RUNNING", None), "A is open"
    hand.settle()
    assert hand.status(process) == ("COMPLETED", None)
    assert (seen(hand, process), hand.pending()) == ("resta", [])


def test_a_canceled_timer_does_not_keep_the_rest_from_being_retried(hand: Hand) -> None:
    process = hand.start(Resting, Told())
    hand.do("work", "A", "park")
    timer = one(hand.db, "SELECT command_id FROM commandbus.command WHERE command_type = 'Timer'")
    hand.db.execute("SELECT commandbus.cancel_v1(%s, %s, 'ann', 'no')", (hand.domain, timer))
    retried = "SELECT commandbus.retry_process_v1(%s, %s, 'ann', 'mended')"
    assert hand.db.execute(retried, (process.domain, process.process_id)).fetchall() == [(1,)]
    assert hand.pending() == [("work", "A")]


def test_finish_ends_what_waits(hand: Hand) -> None:
    process = hand.start(Resting, Told())
    hand.do("work", "A", result='"enough"')
    hand.apply()
    assert hand.steps(process) == ["wait rest CANCELED", "step a COMPLETED"]
    assert one(hand.db, "SELECT count(*) FROM commandbus.command") == 0


def test_what_would_wait_for_ever_is_refused(hand: Hand) -> None:
    process = hand.start(Stuck, Told())
    hand.do("work", "A")
    with pytest.raises(PermanentCommandError, match="would wait for ever"):
        hand.apply()
    assert hand.status(process) == ("RUNNING", None)
    assert hand.steps(process) == ["step a OPEN"], "the reply can be tried again"


# ------------------------------------------------------------------------------------------ deadlines


def test_a_step_that_is_too_late_is_canceled_and_its_worker_can_change_nothing(
    hand: Hand, trial: ProcessReceipt
) -> None:
    late = hand.claim("work", "A")
    hand.wait(2 * DAY)
    hand.apply(2)
    assert hand.status(trial) == ("COMPENSATING", "DEADLINE")
    lease = held(late.command_id, late.delivery, late.lease_token, ',"result":null')
    assert hand.own.execute(complete("work", [lease])) == {late.command_id: "lost"}
    hand.settle()
    assert ends(hand, trial) == ("COMPENSATED", "DEADLINE", [])


def test_a_step_that_has_ended_is_not_late_however_late_its_reply_is(hand: Hand, trial: ProcessReceipt) -> None:
    for name in ("A", "B", "C"):
        hand.do("work", name)
    hand.wait(2 * DAY)
    hand.settle()
    assert ends(hand, trial) == ("COMPLETED", None, [])


def test_all_timers_go_with_their_step(hand: Hand, trial: ProcessReceipt) -> None:
    hand.do("work", "A")
    hand.apply()
    left = rows(hand.db, "SELECT name FROM commandbus.process_steps WHERE kind = 'deadline' AND status = 'OPEN'")
    assert left == [("Trial",)]


def test_a_process_that_is_too_late_is_compensated(hand: Hand, trial: ProcessReceipt) -> None:
    hand.do("work", "A")
    hand.apply()
    hand.wait(31 * DAY)
    hand.apply()
    hand.settle()
    assert ends(hand, trial) == ("COMPENSATED", "DEADLINE", ["a COMPLETED"])


# --------------------------------------------------------------------------------------------- races


def test_of_two_replies_the_second_waits_for_the_first(hand: Hand, trial: ProcessReceipt, connect: Connect) -> None:
    """Both would see the other step open, and neither would finish."""
    for name in ("A", "B", "C"):
        hand.do("work", name)
    hand.apply()
    first, second = (hand.claim("trials", "Reply").command("hand") for _ in range(2))
    before, other = connect(), connect()
    drive_blocking(applying(hand.kinds, first, 1 << 18), adopt(before).execute)
    with background() as pool:
        waiting = start_waiting(pool, hand.db, other, lambda connection: _apply_and_commit(hand, second, connection))
        before.commit()
        waiting.result(10)
    assert hand.status(trial)[0] == "COMPLETED"
    applied = "SELECT applied FROM commandbus.process_step WHERE kind = 'step' ORDER BY applied"
    assert rows(hand.db, applied) == [(1,), (2,), (3,)]


def _apply_and_commit(hand: Hand, command: Any, connection: psycopg.Connection) -> None:  # noqa: ANN401 - a Command
    drive_blocking(applying(hand.kinds, command, 1 << 18), adopt(connection).execute)
    connection.commit()


# ------------------------------------------------------------------------------------------ the desk


def verb(hand: Hand, name: str, process: object, operator: str = "ann") -> Any:  # noqa: ANN401 - what it answers
    return one(hand.db, f"SELECT commandbus.{name}_process_v1('trials', %s, %s, 'why')", process, operator)


def test_cancel_undoes_what_is_done(hand: Hand, trial: ProcessReceipt) -> None:
    hand.do("work", "A")
    hand.apply()
    verb(hand, "cancel", trial.process_id)
    hand.settle()
    assert ends(hand, trial) == ("COMPENSATED", "CANCELED", ["a COMPLETED"])


def test_resume_ends_a_wait_now(hand: Hand) -> None:
    process = hand.start(Resting, Told())
    assert verb(hand, "resume", process.process_id) == ["rest"]
    hand.settle()
    assert hand.steps(process) == ["wait rest CANCELED", "step a COMPLETED", "wait rest COMPLETED"]


@pytest.mark.parametrize("held_up_by", ["a parked step", "a parked reply", "a canceled reply"])
def test_retry_lets_it_go_on(hand: Hand, trial: ProcessReceipt, held_up_by: str) -> None:
    if held_up_by == "a parked step":
        hand.do("work", "A", "park")
    else:
        hand.do("work", "A")
        hand.do("trials", "Reply", "park")
        if held_up_by == "a canceled reply":
            sql = "SELECT commandbus.cancel_v1(domain, command_id, 'ann', 'by mistake') FROM commandbus.troubleshooting"
            hand.db.execute(sql)
    assert verb(hand, "retry", trial.process_id) == 1
    hand.settle()
    assert ends(hand, trial) == ("COMPLETED", None, [])


@pytest.mark.parametrize("name", ["cancel", "resume", "retry"])
def test_what_is_not_so_is_refused(hand: Hand, trial: ProcessReceipt, name: str) -> None:
    def refused(process: object, operator: str = "ann") -> str | None:
        with pytest.raises(psycopg.Error) as raised:
            verb(hand, name, process, operator)
        return raised.value.sqlstate

    assert refused(trial.process_id, "") == "CB001"
    assert refused(uuid4()) == "CB002"
    if name != "cancel":
        assert refused(trial.process_id) == "CB003", "nothing waits, nothing is parked"
    hand.settle()
    assert refused(trial.process_id) == "CB003", "it has ended"


def test_a_start_is_known_again_by_its_id(hand: Hand) -> None:
    new = uuid4()
    assert [hand.start(Stuck, Told(), new).duplicate for _ in range(2)] == [False, True]
    assert one(hand.db, "SELECT count(*) FROM commandbus.command") == 1


def test_finished_processes_leave_when_their_retention_is_over(hand: Hand, trial: ProcessReceipt) -> None:
    hand.settle()
    hand.start(Stuck, Told())
    hand.wait(40 * DAY)
    hand.db.execute("SELECT * FROM commandbus.drop_finished_v1()")
    assert [row[0] for row in rows(hand.db, "SELECT process_type FROM commandbus.processes")] == ["Stuck"]
    assert one(hand.db, "SELECT count(*) FROM commandbus.process_step") == 1


# -------------------------------------------------------------------------------------------- verify

_OF = "process_id = %(id)s"
_STEP = f"UPDATE commandbus.process_step SET {{}} WHERE {_OF} AND kind = 'step' AND name = 'a'"
CORRUPTIONS = {
    "a step is lost": ("process_steps", f"DELETE FROM commandbus.process_step WHERE {_OF} AND name = 'b'"),
    "a process is lost": ("step_without_process", f"DELETE FROM commandbus.process WHERE {_OF}"),
    "an outcome was not counted": ("process_revision", f"UPDATE commandbus.process SET revision = 0 WHERE {_OF}"),
    "an outcome was applied twice": ("process_revision", _STEP.format("applied = 2")),
    "it has ended, and waits": (
        "process_open",
        f"UPDATE commandbus.process SET status = 'COMPLETED', result = '1', finished_at = started_at WHERE {_OF}",
    ),
    "it waits for nothing": (
        "process_open step_status",
        f"UPDATE commandbus.process_step SET status = 'CANCELED', ended_at = sent_at WHERE {_OF} AND status = 'OPEN'",
    ),
    "a running process was undone": (
        "process_end",
        _STEP.format("kind = 'undo', of_number = 3, command_id = command_id"),
    ),
    "a step says other than its command": ("step_status", _STEP.format("status = 'FAILED'")),
    "a command is lost": (
        "step_without_command",
        "DELETE FROM commandbus.command WHERE command_type = 'C' AND correlation_id = %(id)s::text",
    ),
    "a reply was not applied": (
        "process_revision reply_lost",
        _STEP.format("status = 'OPEN', applied = NULL, ended_at = NULL"),
    ),
    "a reply was not sent": (
        "reply_lost reply_missing",
        "DELETE FROM commandbus.command WHERE command_type = 'Reply' AND correlation_id = %(id)s::text",
    ),
}


@pytest.mark.corrupts
@pytest.mark.parametrize("name", CORRUPTIONS)
def test_what_is_corrupted_is_found(hand: Hand, trial: ProcessReceipt, name: str) -> None:
    hand.do("work", "A")
    hand.apply()
    hand.do("work", "B")  # its reply waits
    assert rows(hand.db, "SELECT violation FROM commandbus.verify_v1()") == []
    expected, statement = CORRUPTIONS[name]
    assert hand.db.execute(statement.encode(), {"id": trial.process_id}).rowcount > 0
    found = {row[0] for row in rows(hand.db, "SELECT violation FROM commandbus.verify_v1()")}
    assert found == set(expected.split())
