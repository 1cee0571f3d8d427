"""Commands that have lived: one for each kind of history, played through the functions themselves."""

from __future__ import annotations

import json

from tests.sql.support import (
    HOUR,
    KINDS,
    Connection,
    Row,
    claim,
    column,
    item,
    look_ahead,
    operator_verb,
    outcome,
    segments,
    send_ids,
    shift,
    status_of,
    sweep,
)

LONG = 1e7  # seconds: beyond all that the clock moves here

# What happens to each, and where it ends. Its name is its type, so that each can be claimed by itself.
LIVES = {
    "waiting": "",
    "delayed": "",
    "urgent": "claim",
    "running": "claim",
    "released": "claim release",
    "backing-off": "claim back-off",
    "running-again": "claim TRANSIENT claim release claim",
    "crashed": "claim crash",
    "crashed-twice": "claim crash claim crash claim release",
    "crashed-thrice": "claim crash claim TRANSIENT claim crash claim crash",
    "expired": "ahead crash",
    "expired-and-crashed": "ahead crash claim crash claim complete",
    "parked": "claim PERMANENT",
    "exhausted": "claim TRANSIENT claim TRANSIENT claim TRANSIENT",
    "retried": "claim crash claim TRANSIENT claim PERMANENT retry claim TRANSIENT claim crash",
    "edited": "claim PERMANENT edit claim PERMANENT edit claim TRANSIENT",
    "completed": "claim complete",
    "completed-late": "claim TRANSIENT claim release claim crash claim complete",
    "completed-alone": "claim crash claim crash claim complete",
    "completed-edited": "claim PERMANENT edit claim complete",
    "failed": "claim BUSINESS",
    "failed-late": "claim TRANSIENT claim BUSINESS",
    "canceled": "cancel",
    "canceled-delayed": "cancel",
    "canceled-running": "claim release claim cancel",
    "canceled-parked": "claim PERMANENT cancel",
    "given-up": "claim PERMANENT retry claim PERMANENT operator_cancel",
    "done-by-hand": "claim TRANSIENT claim PERMANENT operator_complete",
    "asking": "claim",
    "asking-parked": "claim PERMANENT",
    "answered": "claim complete",
    "answered-late": "claim TRANSIENT claim BUSINESS",
    "answered-by-hand": "claim PERMANENT operator_complete",
    "answered-canceled": "cancel",
    "awaited": "claim complete",
}
_SENT: dict[str, Row] = {
    "delayed": {"delay": LONG},
    "canceled-delayed": {"delay": LONG},
    "urgent": {"priority": 50},
    "exhausted": {"max_attempts": 3},
    "running-again": {"max_attempts": 2},
    "backing-off": {"max_attempts": 2},
    **{name: {"reply_to": "replies"} for name in LIVES if name.startswith(("asking", "answered"))},
    "awaited": {"reply_to": f"?{'a' * 32}"},
}


def live_all(db: Connection) -> dict[str, str]:
    """Let each live; returns their ids by name."""
    clock = [0.0]
    return {name: _live(db, name, clock) for name in LIVES}


def _live(db: Connection, name: str, clock: list[float]) -> str:
    (command_id,) = send_ids(db, command_type=name, **_SENT.get(name, {}))
    lease: Row = {}
    for number, step in enumerate(LIVES[name].split(), 1):
        if step == "claim":
            alone = column(db, "alone_since", command_id) is not None
            dies = LIVES[name].split()[number:][:1] == ["crash"]
            (leased,) = claim(db, parts=segments(name), alone=alone, lease=60 if dies else LONG)
            lease = item(leased)
        elif step == "ahead":
            lease = item(look_ahead(db, 0, 1, parts=segments(name))[0])
        elif step == "crash":
            clock[0] += 61
            shift(db, clock[0])
            sweep(db)
        elif step == "edit":
            data = json.dumps({"n": number, "by": "ana"})
            db.execute("SELECT commandbus.operator_retry_v1('d', %s, 'ana', 'typo', %s)", [command_id, data])
        elif step in {"retry", "operator_cancel", "operator_complete", "cancel"}:
            assert operator_verb(db, step.replace("retry", "operator_retry"), command_id) == "ok"
        else:
            verb = f"fail {step}" if step in KINDS else step.replace("back-off", "fail TRANSIENT")
            wait = HOUR * 1000 if step == "back-off" else 0
            assert outcome(db, verb, {**lease, "retry_in": wait}) == "done"
    assert status_of(db, command_id) != "absent"
    return command_id
