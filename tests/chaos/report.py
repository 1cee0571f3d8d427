"""The figures of a run."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

from tests.chaos.check import Found
from tests.chaos.plan import LEASE, TOLD, UNDO, Plan
from tests.chaos.records import Db

TAKEOVER_SECONDS = LEASE + LEASE / 6 + 1
"""From the SIGKILL of a worker until its commands are claimed again, on a machine that is not busy."""

RESTART_SECONDS = 5.0
"""From the start of a server that was killed until a command is claimed."""

# A command that crashed for the second time waits until a worker is idle, and is left out.
_TAKEOVERS = """
SELECT extract(epoch FROM n.occurred_at - f.began)::float8 FROM chaos.fault f
JOIN trail t ON t.event = 'CRASHED' AND t.worker LIKE '%-' || f.pid || '-%' AND t.occurred_at > f.began
JOIN trail l ON l.command_id = t.command_id AND l.delivery = t.delivery AND l.event = 'CLAIMED'
JOIN trail n ON n.command_id = t.command_id AND n.delivery = t.delivery + 1 AND n.event = 'CLAIMED'
WHERE f.kind = 'kill' AND l.occurred_at < f.began
AND NOT EXISTS (SELECT FROM trail o WHERE o.command_id = t.command_id AND o.event = 'CRASHED' AND o.step < t.step)
ORDER BY 1"""

# The part of that which does not depend on how many commands wait: until the lease is found to have run out.
_NOTICED = """
SELECT extract(epoch FROM t.occurred_at - f.began)::float8 FROM chaos.fault f
JOIN trail t ON t.event = 'CRASHED' AND t.worker LIKE '%-' || f.pid || '-%' AND t.occurred_at > f.began
WHERE f.kind = 'kill' ORDER BY 1"""

_RESTARTS = """
SELECT extract(epoch FROM min(t.occurred_at) - f.ended)::float8 FROM chaos.fault f
JOIN trail t ON t.event = 'CLAIMED' AND t.occurred_at > f.ended WHERE f.kind = 'crash' GROUP BY f.ended ORDER BY 1"""

_COUNTS = {
    "expired_leases": "SELECT count(*) FROM trail WHERE event = 'CRASHED'",
    "zombies": """
        SELECT count(DISTINCT (n.command_id, n.delivery)) FROM chaos.note n JOIN trail t USING (command_id, delivery)
        WHERE n.what IN ('woke', 'foreign') AND t.event = 'CRASHED' AND t.occurred_at < n.at""",
    "stale_writes_refused": """
        SELECT count(*) FROM chaos.note n
        WHERE n.what = 'refused' OR n.what = 'foreign' AND n.outcome = 'lost'""",
    "given_up_as_late": "SELECT count(*) FROM chaos.note WHERE what = 'late'",
    "parked": "SELECT count(*) FROM trail WHERE to_status = 'IN_TROUBLESHOOTING_QUEUE'",
    "batches": "SELECT count(*) FROM commandbus.batches",
    "replies": f"SELECT count(*) FROM told WHERE command_type = 'Reply' AND domain = '{TOLD}'",
    "calls": "SELECT count(*) FROM chaos.note WHERE what = 'called'",
    "processes": "SELECT count(*) FROM commandbus.processes",
    "processes_not_completed": "SELECT count(*) FROM commandbus.processes WHERE status <> 'COMPLETED'",
    "operators_won": "SELECT count(*) FROM chaos.note WHERE what = 'operator' AND outcome = 'won'",
    "operators_lost": "SELECT count(*) FROM chaos.note WHERE what = 'operator' AND outcome = 'lost'",
}


def figures(db: Db, plan: Plan, found: list[Found], seconds: float) -> dict[str, Any]:
    """Return them by name; `check` has run on this connection before."""

    def column(query: str) -> list[Any]:
        return [row[0] for row in db.execute(query.encode())]

    kinds = Counter(column("SELECT kind FROM chaos.fault"))
    return {
        "seed": plan.seed,
        "commands": column("SELECT count(*) FROM chaos.planned WHERE way <> 'rolled back'")[0],
        "accepted": column(f"SELECT count(*) FROM kept WHERE command_type <> '{UNDO}'")[0],
        "faults": kinds.total(),
        "faults_by_kind": dict(sorted(kinds.items())),
        **{name: column(query)[0] for name, query in _COUNTS.items()},
        "sends_by_outcome": dict(db.execute(  # type: ignore[arg-type]
            "SELECT outcome, count(*) FROM chaos.note WHERE what = 'sent' GROUP BY 1 ORDER BY 1").fetchall()),
        "takeover_seconds": _summary(column(_TAKEOVERS), TAKEOVER_SECONDS),
        "noticed_seconds": _summary(column(_NOTICED), TAKEOVER_SECONDS),
        "restart_to_first_claim_seconds": _summary(column(_RESTARTS), RESTART_SECONDS),
        "duration_seconds": round(seconds, 1),
        "violations_by_name": dict(sorted(Counter(each.violation for each in found).items())),
        "violations": len(found),
    }  # fmt: skip


def _summary(seconds: list[float], bound: float) -> dict[str, float | int | None]:
    late = sum(each > bound for each in seconds)
    return {"count": len(seconds), "median": round(seconds[len(seconds) // 2], 2) if seconds else None,
            "max": round(seconds[-1], 2) if seconds else None, "bound": round(bound, 2), "late": late}  # fmt: skip


def line(figures: dict[str, Any]) -> str:
    """The last line of a run, for programs."""
    return json.dumps(figures)
