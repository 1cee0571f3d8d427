"""What must hold after a run: each a query that finds what contradicts it, a command's id or what is wrong in words."""

from __future__ import annotations

from dataclasses import dataclass

from tests.chaos.plan import DOMAIN, EFFECTS, HOPELESS, MAX_ATTEMPTS, POISONS, PROCESSES, STRAY, TOLD, ZOMBIES
from tests.chaos.records import Db


@dataclass(frozen=True)
class Found:
    """A violation: its name, and which command or what else."""

    violation: str
    detail: str


_TOLD = "n.outcome IN ('accepted', 'duplicate')"
_GUILTY = (*HOPELESS, *POISONS, *ZOMBIES, STRAY)  # the kinds that may be parked, the last by chance


def _kinds(kinds: tuple[str, ...]) -> str:
    return "(" + ", ".join(f"'{kind}'" for kind in kinds) + ")"


CHECKS = {
    # -- sending
    "lost": f"""
        SELECT DISTINCT n.command_id FROM chaos.note n WHERE n.what = 'sent' AND {_TOLD}
        AND NOT EXISTS (SELECT FROM kept c WHERE c.command_id = n.command_id)
        AND NOT EXISTS (SELECT FROM commandbus.batches b WHERE b.batch_id = n.command_id)
        AND NOT EXISTS (SELECT FROM commandbus.processes p WHERE p.process_id = n.command_id)""",
    "rolled_back_but_sent": """
        SELECT c.command_id FROM kept c JOIN chaos.planned p USING (command_id) WHERE p.way = 'rolled back'""",
    "withdrawn_but_sent": """
        SELECT c.command_id FROM kept c
        JOIN chaos.note n ON n.command_id = c.command_id AND n.what = 'sent' AND n.outcome = 'withdrawn'
        WHERE NOT EXISTS (SELECT FROM chaos.note o WHERE o.command_id = c.command_id AND o.what = 'sent'
                          AND o.outcome IN ('accepted', 'duplicate', 'unknown', 'unavailable'))""",
    "accepted_twice": """
        SELECT n.command_id FROM chaos.note n WHERE n.what = 'sent' AND n.outcome = 'accepted'
        GROUP BY n.command_id HAVING count(*) > 1""",
    "nobody_sent": """
        SELECT c.command_id FROM kept c LEFT JOIN chaos.planned p USING (number)
        WHERE p.way IS NULL OR p.way NOT IN ('minted', 'process') AND p.command_id <> c.command_id""",
    # -- the end
    "unsettled": "SELECT c.command_id FROM kept c WHERE c.status NOT IN ('COMPLETED', 'FAILED', 'CANCELED')",
    "not_one_end": """
        SELECT c.command_id FROM kept c LEFT JOIN trail t
            ON t.command_id = c.command_id AND t.to_status IN ('COMPLETED', 'FAILED', 'CANCELED')
        GROUP BY c.command_id HAVING count(t.step) <> 1""",
    "wrong_end": f"""
        SELECT c.command_id FROM kept c
        WHERE NOT EXISTS (SELECT FROM trail t WHERE t.command_id = c.command_id AND t.operator IS NOT NULL)
        AND c.status <> CASE WHEN c.command_type = 'Refused' THEN 'FAILED' ELSE 'COMPLETED' END
        AND c.command_type NOT IN {_kinds((*ZOMBIES, STRAY))}""",
    "too_many_attempts": f"SELECT c.command_id FROM kept c WHERE c.attempts > {MAX_ATTEMPTS}",
    "too_many_crashes": "SELECT c.command_id FROM kept c WHERE c.crashes > 3",
    # -- effects
    "double_effect": "SELECT e.command_id FROM chaos.effect e GROUP BY e.command_id HAVING count(*) > 1",
    "effect_without_completion": """
        SELECT e.command_id FROM chaos.effect e WHERE NOT EXISTS (
            SELECT FROM trail t
            WHERE t.command_id = e.command_id AND t.delivery = e.delivery AND t.event = 'COMPLETED')""",
    "completion_without_effect": f"""
        SELECT t.command_id FROM trail t JOIN kept c USING (command_id)
        WHERE t.event = 'COMPLETED' AND c.command_type IN {_kinds(EFFECTS)} AND NOT EXISTS (
            SELECT FROM chaos.effect e WHERE e.command_id = t.command_id AND e.delivery = t.delivery)""",
    # -- poison, and who stood beside it
    "poison_not_parked": f"""
        SELECT c.command_id FROM kept c WHERE c.command_type IN {_kinds(POISONS)} AND NOT EXISTS (
            SELECT FROM trail t WHERE t.command_id = c.command_id AND t.to_status = 'IN_TROUBLESHOOTING_QUEUE')""",
    # The third crash parks: the command ran alone then, so that a fault has to explain it, or a machine so slow that
    # the worker gave the lease up by itself.
    "innocent_parked": f"""
        SELECT c.command_id FROM (SELECT k.command_id, k.command_type FROM kept k
                                  UNION ALL SELECT r.command_id, r.command_type FROM told r) c
        JOIN trail t ON t.command_id = c.command_id AND t.to_status = 'IN_TROUBLESHOOTING_QUEUE'
        JOIN trail l ON l.command_id = c.command_id AND l.event = 'CLAIMED' AND l.delivery = t.delivery
        WHERE c.command_type NOT IN {_kinds(_GUILTY)} AND NOT (t.event = 'CRASHED' AND EXISTS (
            SELECT FROM chaos.fault f WHERE (f.pid IS NULL OR l.worker LIKE '%-' || f.pid || '-%')
            AND f.began <= t.occurred_at AND f.ended >= l.occurred_at))
        AND NOT (t.event = 'CRASHED' AND EXISTS (
            SELECT FROM chaos.note n
            WHERE n.command_id = c.command_id AND n.delivery = t.delivery AND n.what = 'late'))""",
    # -- who lost the lease changes nothing
    "stale_write_accepted": """
        SELECT n.command_id FROM chaos.note n JOIN trail t USING (command_id, delivery)
        WHERE n.what = 'foreign' AND n.outcome = 'done' AND t.event = 'CRASHED' AND t.occurred_at < n.at""",
    # -- operators
    "action_without_one_event": """
        SELECT n.command_id || ': ' || n.verb || ' by ' || n.who || ' won ' || count(*) FILTER (WHERE n.outcome = 'won')
               || ' times, the trail has ' || min(e.events)
        FROM chaos.note n CROSS JOIN LATERAL (
            SELECT count(*) AS events FROM trail t WHERE t.command_id = n.command_id AND t.operator = n.who
            AND t.event = CASE n.verb WHEN 'retry' THEN 'OPERATOR_RETRIED' WHEN 'cancel' THEN 'OPERATOR_CANCELED'
                                      ELSE 'OPERATOR_COMPLETED' END) e
        WHERE n.what = 'operator' GROUP BY n.command_id, n.who, n.verb
        HAVING NOT min(e.events) BETWEEN count(*) FILTER (WHERE n.outcome = 'won')
                                     AND count(*) FILTER (WHERE n.outcome IN ('won', 'unknown'))""",
    "event_without_action": """
        SELECT t.command_id FROM trail t WHERE t.operator IS NOT NULL AND NOT EXISTS (
            SELECT FROM chaos.note n
            WHERE n.what = 'operator' AND n.command_id = t.command_id AND n.who = t.operator)""",
    # -- replies and calls
    "not_one_reply": f"""
        SELECT c.command_id FROM kept c JOIN chaos.planned p USING (number)
        LEFT JOIN told r ON r.domain = CASE p.way WHEN 'replied' THEN '{TOLD}' ELSE '{PROCESSES}' END
                        AND r.command_type = 'Reply' AND r.data ->> 'command_id' = c.command_id::text
        WHERE p.way IN ('replied', 'process') AND c.finished_at IS NOT NULL
        GROUP BY c.command_id HAVING count(r.command_id) <> 1""",
    "reply_not_handled_once": """
        SELECT c.command_id FROM kept c JOIN chaos.planned p USING (number)
        LEFT JOIN chaos.reply r ON r.command_id = c.command_id WHERE p.way = 'replied'
        GROUP BY c.command_id, c.status HAVING coalesce(array_agg(r.status), '{}') <> ARRAY[c.status]""",
    "called_otherwise": """
        SELECT n.command_id FROM chaos.note n LEFT JOIN kept c USING (command_id)
        WHERE n.what = 'called' AND n.outcome IS DISTINCT FROM c.status""",
    "called_without_return": """
        SELECT p.command_id FROM chaos.planned p JOIN kept c USING (command_id) WHERE p.way = 'called'
        AND NOT EXISTS (SELECT FROM chaos.note n WHERE n.command_id = p.command_id
                        AND (n.what = 'called' OR n.outcome = 'withdrawn'))""",
    # -- batches
    "batch_miscounted": """
        SELECT b.batch_id FROM commandbus.batches b
        CROSS JOIN LATERAL (SELECT count(*) AS total FROM chaos.planned p WHERE p.group_id = b.batch_id) p
        CROSS JOIN LATERAL (
            SELECT count(*) AS total, count(*) FILTER (WHERE c.status = 'COMPLETED') AS completed,
                   count(*) FILTER (WHERE c.status = 'FAILED') AS failed,
                   count(*) FILTER (WHERE c.status = 'CANCELED') AS canceled
            FROM kept c WHERE c.batch_id = b.batch_id) c
        WHERE (b.total, b.total, b.completed, b.failed, b.canceled, b.in_trouble, b.open)
            <> (p.total, c.total, c.completed, c.failed, c.canceled, 0, 0)""",
    "batch_not_ended_once": f"""
        SELECT b.batch_id FROM commandbus.batches b
        LEFT JOIN told e ON e.domain = '{TOLD}' AND e.correlation_id = b.batch_id::text
        GROUP BY b.batch_id, b.finished_at HAVING count(e.command_id) <> 1 OR b.finished_at IS NULL""",
    "batch_end_not_handled": """
        SELECT b.batch_id FROM commandbus.batches b WHERE NOT EXISTS (
            SELECT FROM chaos.note n WHERE n.what = 'announced' AND n.command_id = b.batch_id)""",
    # -- processes: their steps follow each other, the last may fail; then those before it are undone in reverse
    "process_unexplained": """
        SELECT p.process_id FROM commandbus.processes p
        CROSS JOIN LATERAL (SELECT count(*) AS planned FROM chaos.planned g WHERE g.group_id = p.process_id) g
        CROSS JOIN LATERAL (
            SELECT count(*) FILTER (WHERE s.kind = 'step') AS steps,
                   count(*) FILTER (WHERE s.kind = 'step' AND s.status = 'COMPLETED') AS done,
                   count(*) FILTER (WHERE s.kind = 'undo' AND s.status = 'COMPLETED') AS undone,
                   count(*) FILTER (WHERE s.status = 'OPEN') AS open,
                   coalesce(array_agg(s.of_number ORDER BY s.number) FILTER (WHERE s.kind = 'undo'), '{}') AS undo,
                   coalesce(array_agg(s.number ORDER BY s.number DESC)
                            FILTER (WHERE s.kind = 'step' AND s.status = 'COMPLETED'), '{}') AS reverse
            FROM commandbus.process_steps s WHERE s.process_id = p.process_id) s
        WHERE s.open > 0 OR p.status <> CASE
            WHEN s.done = g.planned AND s.steps = s.done AND s.undo = '{}' THEN 'COMPLETED'
            WHEN s.steps <> s.done + 1 OR s.undo <> s.reverse THEN 'no end'
            WHEN s.undone = s.done THEN 'COMPENSATED' ELSE 'FAILED' END""",
    "step_twice": """
        SELECT p.number || ' ' || c.command_type FROM kept c JOIN chaos.planned p USING (number) WHERE p.way = 'process'
        GROUP BY p.number, c.command_type HAVING count(*) > 1""",
    "effect_twice": """
        SELECT c.number || ' ' || c.command_type FROM chaos.effect e JOIN kept c USING (command_id)
        GROUP BY c.number, c.command_type HAVING count(*) > 1""",
}


def check(db: Db) -> list[Found]:
    """Everything that is wrong, by this page, by `verify`, and by what was seen as it happened."""
    # Copies, so that each query reads them once: the trail is a view that is told anew each time.
    db.execute(f"CREATE TEMP TABLE kept AS SELECT c.*, (c.data ->> 'number')::integer AS number"
               f" FROM commandbus.commands c WHERE c.domain = '{DOMAIN}'")  # fmt: skip
    db.execute(f"CREATE TEMP TABLE told AS SELECT * FROM commandbus.commands WHERE domain <> '{DOMAIN}'")
    db.execute("CREATE TEMP TABLE trail AS SELECT * FROM commandbus.audit_trail")
    db.execute("CREATE INDEX ON kept (command_id)")
    db.execute("CREATE INDEX ON trail (command_id)")
    db.execute("ANALYZE kept, told, trail, chaos.planned, chaos.note, chaos.effect")
    found = [Found(name, str(row[0])) for name, query in CHECKS.items() for row in db.execute(query.encode())]
    found += [Found(f"verify: {row[0]}", f"{row[1]}: {row[2]}") for row in db.execute(
        "SELECT violation, command_id, detail FROM commandbus.verify_v1()")]  # fmt: skip
    found += [Found(str(row[0]), str(row[1])) for row in db.execute(
        "SELECT violation, detail FROM chaos.blame UNION ALL"
        " SELECT verb, who || ': ' || outcome FROM chaos.note WHERE what = 'blame'")]  # fmt: skip
    return found
