"""What can be done to a database that commands have lived in, and what `verify_v1` says of it."""

from __future__ import annotations

# What keeps most corruptions out of a sound database.
LOOSEN = """
    ALTER TABLE commandbus.command DROP CONSTRAINT command_in_one_line,
        DROP CONSTRAINT command_pkey, ALTER data_hash DROP NOT NULL;
    ALTER TABLE commandbus.audit_event DROP CONSTRAINT audit_event_pkey;
    ALTER TABLE commandbus.command_history DROP CONSTRAINT command_history_terminal, ALTER data_hash DROP NOT NULL;
"""


def hot(change: str) -> str:
    return f"UPDATE commandbus.command SET {change} WHERE command_id = %(id)s"


def past(change: str) -> str:
    return f"UPDATE commandbus.command_history SET {change} WHERE command_id = %(id)s"


def event(number: int, change: str, table: str = "audit_event") -> str:
    return f"UPDATE commandbus.{table} SET {change} WHERE command_id = %(id)s AND event_no = {number}"


def past_event(number: int, change: str) -> str:
    return event(number, change, "audit_history")


def no_event(number: int) -> str:
    return f"DELETE FROM commandbus.audit_event WHERE command_id = %(id)s AND event_no = {number}"


def gone(table: str) -> str:
    return f"DELETE FROM commandbus.{table} WHERE command_id = %(id)s"


def twice(table: str) -> str:
    return f"INSERT INTO commandbus.{table} SELECT * FROM commandbus.{table} WHERE command_id = %(id)s"


def renumber(after: int, by: int) -> str:
    return (
        f"UPDATE commandbus.audit_event SET event_no = event_no + {by} WHERE command_id = %(id)s AND event_no > {after}"
    )


_EVENT = """event, occurred_at, from_status, to_status, delivery, attempt, worker, claimed_at, lease_token,
    presented_token, operator, reason, error, details"""


def again(number: int, as_number: int) -> str:
    """Tell an event of a finished command once more, under this number."""
    return f"""INSERT INTO commandbus.audit_history (domain, command_id, event_no, finished_at, {_EVENT})
               SELECT domain, command_id, {as_number}, finished_at, {_EVENT}
               FROM commandbus.audit_history WHERE command_id = %(id)s AND event_no = {number}"""


_MOVED = f"domain, command_id, event_no, {_EVENT}"
_TO_EVENTS = f"""WITH gone AS (DELETE FROM commandbus.audit_history WHERE command_id = %(id)s RETURNING *)
    INSERT INTO commandbus.audit_event ({_MOVED}) SELECT {_MOVED} FROM gone"""
_TO_HISTORY = f"""WITH gone AS (DELETE FROM commandbus.audit_event WHERE command_id = %(id)s RETURNING *)
    INSERT INTO commandbus.audit_history ({_MOVED}, finished_at) SELECT {_MOVED}, clock_timestamp() FROM gone"""
_KEPT = """domain, command_id, command_type, priority, max_attempts, attempts, crashes, events, delivery, lease_token,
    lease_until, claimed_at, worker, sent_at, not_before, data_hash, data, headers"""
_ALSO_UNFINISHED = f"""INSERT INTO commandbus.command ({_KEPT}, status, place)
    SELECT {_KEPT}, 'PENDING', commandbus._place(priority) FROM commandbus.command_history WHERE command_id = %(id)s"""
_ALSO_FINISHED = f"""INSERT INTO commandbus.command_history ({_KEPT}, status, presented_token, finished_at)
    SELECT {_KEPT}, 'COMPLETED', lease_token, clock_timestamp() FROM commandbus.command WHERE command_id = %(id)s"""
_MARKS = "FROM commandbus.command c WHERE c.command_id = %(id)s AND m.command_type = c.command_type"
_OTHER = "gen_random_uuid()"
_FIRST = "(SELECT a.lease_token FROM commandbus.audit_trail a WHERE a.command_id = %(id)s AND a.step = 2)"
_BACK = "status = 'PENDING', place = commandbus._place(priority), due_at = NULL, parked_at = NULL, alone_since = NULL"

# The reply to this command, when it ends now, and the one that it has.
_REPLY_NOW = """WITH gone AS (SELECT c.* FROM commandbus.command c WHERE c.command_id = %(id)s), reply AS (
        SELECT g.*, clock_timestamp() AS now, jsonb_build_object('domain', g.domain, 'command_id', g.command_id) AS said
        FROM gone g)
    INSERT INTO commandbus.command (domain, command_id, command_type, status, place, sent_at, data_hash, data, headers)
    SELECT r.reply_to, commandbus._reply_id(r.domain, r.command_id::text, r.now), 'Reply', 'PENDING',
           commandbus._place(0::smallint), r.now, commandbus._data_hash('Reply', r.said), r.said, r.headers
    FROM reply r"""
_ITS_REPLY = "domain = 'replies' AND data ->> 'command_id' = %(id)s"

# What is done to which command, and all that is reported then: of it, or of its reply.
CORRUPTIONS: dict[str, tuple[str, ...]] = {
    # ------------------------------------------------------------------------------- what is kept
    "an unfinished command is lost": ("released", "event_without_command", gone("command")),
    "a finished command is lost": ("completed-late", "event_without_command", gone("command_history")),
    "a finished command is kept twice": (
        "failed",
        "kept_twice lease_ended_twice",
        twice("command_history"),
    ),
    "a finished command is unfinished too": ("completed", "kept_twice wrong_attempts wrong_delivery", _ALSO_UNFINISHED),
    "a running command is finished too": ("running", "kept_twice wrong_attempts", _ALSO_FINISHED),
    "an unfinished command is kept twice": (
        "waiting",
        "kept_twice same_place",
        twice("command"),
    ),
    "an unfinished command is COMPLETED": (
        "released",
        "broken_chain wrong_line wrong_table",
        hot("status = 'COMPLETED'"),
    ),
    "a finished command is PENDING": ("completed", "unexplained_end wrong_table", past("status = 'PENDING'")),
    # --------------------------------------------------------------------------------- the events
    "the first event is missing": (
        "running-again",
        "event_count event_number wrong_attempts wrong_delivery",
        no_event(1),
    ),
    "the last event is missing": ("released", "event_count wrong_delivery", no_event(1)),
    "all events of a finished command are missing": (
        "completed-late",
        "event_count wrong_attempts wrong_crashes wrong_delivery",
        gone("audit_history"),
    ),
    "an event is missing and the rest renumbered": (
        "edited",
        "broken_chain data_changed event_count wrong_attempts",
        no_event(2),
        renumber(2, -1),
    ),
    "an event is missing and not counted": ("released", "wrong_delivery", no_event(1), hot("events = 0")),
    "an event more is counted": ("waiting", "event_count", hot("events = 1")),
    "an event less is counted": ("completed-late", "event_count", past("events = events - 1")),
    "an event number is passed over": ("running-again", "event_number", renumber(1, 1)),
    "an event is kept twice": (
        "completed-late",
        "event_count event_number lease_ended_twice wrong_delivery",
        again(2, 2),
    ),
    "a number is not known": ("parked", "event_number", event(1, "event_no = 0")),
    "events of a finished command stayed behind": ("failed-late", "event_misplaced", _TO_EVENTS),
    "events of an unfinished command are in history": ("released", "event_misplaced", _TO_HISTORY),
    "an event leaves with another week": (
        "failed-late",
        "event_misplaced",
        past_event(1, "finished_at = finished_at + interval '1 s'"),
    ),
    # --------------------------------------------------------------------------------- the diagram
    "an event has an unknown name": ("released", "illegal_edge wrong_lease", event(1, "event = 'RELAESED'")),
    "an event leads where it cannot": ("released", "illegal_edge", event(1, "to_status = 'SCHEDULED'")),
    "an event begins where it cannot": (
        "parked",
        "illegal_edge wrong_delivery wrong_lease",
        event(1, "from_status = 'PENDING'"),
    ),
    "a permanent failure is retried by itself": ("backing-off", "illegal_edge", event(1, "event = 'PARKED'")),
    "a parked command is pending without a retry": ("parked", "broken_chain", hot(_BACK)),
    "a parked command was claimed without a retry": (
        "edited",
        "broken_chain data_changed wrong_attempts wrong_delivery wrong_lease",
        event(2, "from_status = 'IN_PROGRESS', to_status = 'PENDING', event = 'RELEASED'"),
    ),
    "a waiting command is scheduled by itself": (
        "waiting",
        "broken_chain",
        hot("status = 'SCHEDULED', place = NULL, due_at = clock_timestamp()"),
    ),
    "a pending command was canceled as scheduled": (
        "canceled",
        "broken_chain",
        past_event(1, "from_status = 'SCHEDULED'"),
    ),
    "a status that is none": ("waiting", "broken_chain wrong_line", hot("status = 'PAUSED'")),
    "a canceled command waits again": (
        "canceled",
        "left_terminal",
        _ALSO_UNFINISHED,
        gone("command_history"),
        _TO_EVENTS,
    ),
    "a canceled command was canceled again": ("canceled", "left_terminal", again(1, 2), past("events = 2")),
    "a canceled command was completed by a worker": (
        "canceled-running",
        "lease_ended_twice left_terminal wrong_attempts wrong_delivery",
        past("status = 'COMPLETED', presented_token = lease_token"),
    ),
    # ---------------------------------------------------------------------------------- the endings
    "a completed command is canceled": ("completed", "unexplained_end", past("status = 'CANCELED'")),
    "a canceled command is failed": ("canceled", "unexplained_end", past("status = 'FAILED'")),
    "a completed command has no delivery": (
        "completed",
        "unexplained_end wrong_attempts wrong_delivery",
        past("presented_token = NULL"),
    ),
    "another lease completed it": ("completed", "wrong_lease", past(f"presented_token = {_OTHER}")),
    "an earlier lease completed it": (
        "failed-late",
        "lease_ended_twice wrong_lease",
        past(f"presented_token = {_FIRST}"),
    ),
    "an earlier lease completed it, and is noted": (
        "failed-late",
        "lease_ended_twice",
        past(f"presented_token = {_FIRST}, lease_token = {_FIRST}"),
    ),
    "another lease failed": ("backing-off", "wrong_lease", event(1, f"presented_token = {_OTHER}")),
    "no lease parked": ("parked", "wrong_lease", event(1, "presented_token = NULL")),
    "a crash presented a lease": ("crashed", "wrong_lease", event(1, "presented_token = lease_token")),
    "an event has no worker": ("crashed", "wrong_lease", event(1, "worker = NULL")),
    "an operator has a lease": ("edited", "wrong_lease", event(2, f"lease_token = {_OTHER}")),
    "the latest lease is not that of the latest event": ("parked", "wrong_lease", hot(f"lease_token = {_OTHER}")),
    "the worker of the latest lease is another": ("parked", "wrong_lease", hot("worker = 'w9'")),
    "a running command has no token": ("running", "wrong_lease", hot("lease_token = NULL")),
    "a running command has no end of its lease": ("running", "wrong_lease", hot("lease_until = NULL")),
    "a command that nobody claimed has a worker": ("waiting", "wrong_lease", hot("worker = 'w9'")),
    # ------------------------------------------------------------------------------- the deliveries
    "the delivery went back": ("backing-off", "wrong_delivery wrong_lease", hot("delivery = 0")),
    "the delivery leapt": ("running", "wrong_delivery", hot("delivery = 5")),
    "a claim was not counted": ("completed-late", "wrong_delivery wrong_lease", past("delivery = delivery - 1")),
    "two endings of one delivery": ("running-again", "wrong_delivery", event(2, "delivery = 1")),
    "an event is beyond the command's delivery": ("released", "wrong_delivery", event(1, "delivery = 9")),
    "an operator's event is of another delivery": ("edited", "wrong_delivery", event(2, "delivery = 2")),
    "two endings by one lease": (
        "running-again",
        "lease_ended_twice",
        event(2, f"lease_token = {_FIRST}, presented_token = {_FIRST}"),
    ),
    # ---------------------------------------------------------------------------------- the bounds
    "attempts are given away": ("backing-off", "wrong_attempts", hot("attempts = 0")),
    "an attempt too many is counted": ("completed", "wrong_attempts", past("attempts = 2")),
    "an attempt has another number": ("edited", "wrong_attempts", event(1, "attempt = 2")),
    "a release is an attempt": ("released", "wrong_attempts", event(1, "attempt = 1")),
    "more attempts than are allowed": ("exhausted", "too_many_attempts", hot("max_attempts = 2")),
    "a command without attempts left is tried again": ("backing-off", "too_many_attempts", hot("max_attempts = 1")),
    "a command without attempts left is running": ("running-again", "too_many_attempts", hot("max_attempts = 1")),
    "a completion after all attempts": ("failed-late", "too_many_attempts", past("max_attempts = 1")),
    "crashes are given away": (
        "crashed-twice",
        "wrong_crashes",
        hot("crashes = 1, place = commandbus._place(priority), alone_since = NULL"),
    ),
    "a crash too many is counted": ("completed", "wrong_crashes", past("crashes = 1")),
    "the third crash did not park": (
        "crashed-thrice",
        "too_many_crashes",
        event(4, "to_status = 'PENDING'"),
        hot("status = 'PENDING', alone_since = parked_at, parked_at = NULL"),
    ),
    "a later delivery ran out uncharged": (
        "running-again",
        "too_many_crashes",
        event(2, "event = 'EXPIRED', presented_token = NULL"),
    ),
    "the first crash parked": (
        "crashed",
        "too_many_crashes",
        event(1, "to_status = 'IN_TROUBLESHOOTING_QUEUE'"),
        hot(
            "status = 'IN_TROUBLESHOOTING_QUEUE', place = NULL, parked_at = (SELECT e.occurred_at "
            "FROM commandbus.audit_event e WHERE e.command_id = command.command_id)"
        ),
    ),
    # ----------------------------------------------------------------------------------- the lines
    "a waiting command stands nowhere": ("waiting", "wrong_line", hot("place = NULL")),
    "a parked command stands nowhere": ("parked", "wrong_line", hot("parked_at = NULL")),
    "a scheduled command is due never": ("backing-off", "wrong_line", hot("due_at = NULL")),
    "a parked command waits to be claimed": ("parked", "wrong_line", hot("place = commandbus._place(priority)")),
    "a running command is due": ("running", "wrong_line", hot("due_at = clock_timestamp()")),
    "what crashed twice is not alone": (
        "crashed-twice",
        "wrong_line",
        hot("alone_since = NULL, place = commandbus._place(priority)"),
    ),
    "what never crashed is alone": ("running", "wrong_line", hot("alone_since = clock_timestamp(), place = NULL")),
    "the place of another priority": ("waiting", "wrong_place", hot("place = place + (1::bigint << 54)")),
    "the priority of another place": ("urgent", "wrong_place", hot("priority = 0")),
    "the place of another command": (
        "released",
        "same_place",
        hot("place = (SELECT w.place FROM commandbus.command w WHERE w.command_type = 'waiting')"),
    ),
    "it is due earlier than it was sent for": ("delayed", "wrong_moment", hot("due_at = due_at - interval '1 us'")),
    "it was parked at another moment": ("parked", "wrong_moment", hot("parked_at = parked_at - interval '1 year'")),
    "a failed command is completed": ("failed", "error_kept", past("status = 'COMPLETED'")),
    "no claim mark": ("running", "no_claim_mark", f"DELETE FROM commandbus.claim_mark m USING {_MARKS[5:]}"),
    "a claim mark below": (
        "urgent",
        "no_claim_mark",
        f"UPDATE commandbus.claim_mark m SET place = c.place - 1 {_MARKS}",
    ),
    # ------------------------------------------------------------------------------- the operators
    "nobody retried": ("retried", "no_operator", event(4, "operator = NULL")),
    "an operator without a name": ("done-by-hand", "no_operator", past_event(3, "operator = ''")),
    "an edit without the old data": (
        "edited",
        "data_changed edit_not_kept",
        event(2, "details = details - 'old_data'"),
    ),
    "an edit without the new data": (
        "completed-edited",
        "data_changed edit_not_kept",
        past_event(2, "details = details - 'new_data'"),
    ),
    "an edit that is not told": ("edited", "data_changed", event(4, "details = NULL")),
    "an edit that tells other old data": (
        "edited",
        "data_changed",
        event(4, "details = details || '{\"old_data\": 0}'"),
    ),
    "the data of a waiting command are others": ("waiting", "data_changed", hot("data = '{\"n\": 2}'")),
    "the data of a finished command are others": ("completed-edited", "data_changed", past("data = '{\"n\": 2}'")),
    "the type is another": ("completed", "data_changed", past("command_type = 'waiting'")),
    "the hash is missing": ("waiting", "data_changed", hot("data_hash = NULL")),
    "the hash is another": ("failed", "data_changed", past("data_hash = sha256('x')")),
    # -------------------------------------------------------------------------------- the moments
    "it ended before it was claimed": (
        "released",
        "time_order",
        event(1, "occurred_at = claimed_at - interval '1 us'"),
    ),
    "it was canceled before it was sent": (
        "canceled",
        "time_order",
        past_event(1, "occurred_at = occurred_at - interval '1 day'"),
    ),
    "an event is older than the one before": (
        "canceled-parked",
        "time_order",
        past_event(1, "occurred_at = occurred_at + interval '1 hour'"),
    ),
    "it finished before its last event": (
        "done-by-hand",
        "time_order",
        past_event(3, "occurred_at = occurred_at + interval '1 hour'"),
    ),
    "it finished before it was sent": ("completed", "time_order", past("sent_at = finished_at + interval '1 us'")),
    "it finished before it was claimed": (
        "completed",
        "time_order",
        past("claimed_at = finished_at + interval '1 us'"),
    ),
    # -------------------------------------------------------------------------------- the replies
    "a reply is lost": ("answered", "reply_missing", f"DELETE FROM commandbus.command WHERE {_ITS_REPLY}"),
    "a reply went elsewhere": ("answered-late", "reply_missing reply_without_end", past("reply_to = 'others'")),
    "a reply says something else": ("answered-by-hand", "wrong_reply", past('result = \'{"by": "foot"}\'')),
    "a reply is of another type": (
        "answered",
        "data_changed wrong_reply",
        f"UPDATE commandbus.command SET command_type = 'Answer', data_hash = sha256('x') WHERE {_ITS_REPLY}",
    ),
    "what runs has a reply": ("asking", "reply_without_end", _REPLY_NOW),
    "what is parked has a reply": ("asking-parked", "reply_without_end", _REPLY_NOW),
    "what has a reply is lost": ("answered", "reply_without_end", gone("command_history")),
    "what has a reply runs again": (
        "answered",
        "reply_without_end wrong_attempts wrong_delivery",
        _ALSO_UNFINISHED,
        gone("command_history"),
    ),
}
