"""What `doctor` checks: a list of questions to the database, each with a judgement of the rows of its answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple, TypeAlias

from commandbus.cli.terminal import age
from commandbus.migrate import explain_mismatch

_MINUTE = 60.0


class Level(StrEnum):
    """How a check turned out, the worst last."""

    OK = "OK"
    UNSEEN = "UNSEEN"
    WARNING = "WARNING"
    FAILURE = "FAILURE"


class Verdict(NamedTuple):
    """What was found, and what there is to do unless it is OK."""

    level: Level
    found: str
    advice: str | None = None


Judge: TypeAlias = Callable[..., Verdict]


@dataclass(frozen=True, slots=True)
class Check:
    """A question, the judge of each row of the answer, and what it means that there is none.

    `%(here)s` in the query stands for this machine's clock, in seconds since 1970.
    """

    name: str
    query: str
    judge: Judge
    nothing: str


CHECKS: list[Check] = []


def _check(name: str, query: str, nothing: str = "") -> Callable[[Judge], Judge]:
    def add(judge: Judge) -> Judge:
        CHECKS.append(Check(name, query, judge, nothing))
        return judge

    return add


def _above(value: float, warning: float, failure: float = float("inf")) -> Level:
    return Level.FAILURE if value > failure else Level.WARNING if value > warning else Level.OK


# -- the server --------------------------------------------------------------------------------------------------------


@_check("server", "SELECT current_setting('server_version'), current_setting('server_version_num')::int >= 150000")
def server(version: str, new: bool) -> Verdict:  # noqa: FBT001 - a column
    """PostgreSQL 15 or newer."""
    return Verdict(Level.OK if new else Level.FAILURE, f"PostgreSQL {version}", "upgrade it to 15 or newer")


@_check("schema", "SELECT version, oldest_client FROM commandbus.schema_v1()")
def schema(version: int, oldest_client: int) -> Verdict:
    """The schema fits this client."""
    problem = explain_mismatch(version, oldest_client)
    return Verdict(Level.FAILURE, problem) if problem else Verdict(Level.OK, f"version {version}, which fits")


_OFF = {
    "fsync": (Level.FAILURE, "a crash of the machine may destroy all data"),
    "full_page_writes": (
        Level.WARNING,
        "a crash of the machine may leave torn pages, unless the file system prevents it",
    ),
    "synchronous_commit": (Level.FAILURE, "a crash of the server loses commands that `send` has acknowledged"),
}


@_check(
    "durability",
    "SELECT s.name FROM pg_settings s WHERE s.setting = 'off' "
    "AND s.name IN ('fsync', 'full_page_writes', 'synchronous_commit') ORDER BY 1",
    "fsync, full_page_writes and synchronous_commit are on",
)
def durability(setting: str) -> Verdict:
    """What is committed survives a crash."""
    level, consequence = _OFF[setting]
    return Verdict(level, f"{setting} is off: {consequence}", "turn it on in the configuration of the server")


@_check("clock", "SELECT extract(epoch FROM clock_timestamp())::float8 - %(here)s")
def clock(ahead: float) -> Verdict:
    """Leases go by the server's clock alone; people read both."""
    found = f"the server's is {abs(ahead):.1f} s {'ahead of' if ahead > 0 else 'behind'} this machine's"
    return Verdict(
        _above(abs(ahead), 5), found, "no lease depends on it, but people compare logs: synchronise the clocks"
    )


@_check(
    "test clock",
    "SELECT FROM commandbus.setting s WHERE s.name = 'test_clock' AND s.value = 'on'",
    "it is closed",
)
def test_clock() -> Verdict:
    """Only a test database lets sessions move the clock."""
    advice = "unless this is a test database, set `test_clock` to `off` in commandbus.setting"
    return Verdict(Level.WARNING, "it is open: any session can let leases expire", advice)


# -- vacuum ------------------------------------------------------------------------------------------------------------


@_check(
    "transactions",
    """WITH open AS (
           SELECT concat_ws(' ', 'process', a.pid, nullif(a.application_name, '')) AS who,
                  clock_timestamp() - a.xact_start AS age
           FROM pg_stat_activity a
           WHERE a.datname = current_database() AND a.backend_type IS DISTINCT FROM 'autovacuum worker'
             AND (a.backend_xid IS NOT NULL OR a.backend_xmin IS NOT NULL) AND a.pid <> pg_backend_pid()
           UNION ALL
           SELECT 'prepared transaction ' || p.gid, clock_timestamp() - p.prepared
           FROM pg_prepared_xacts p WHERE p.database = current_database())
       (SELECT o.who, extract(epoch FROM o.age)::float8 FROM open o WHERE o.age IS NOT NULL ORDER BY o.age DESC LIMIT 1)
       UNION ALL SELECT count(*)::text, NULL FROM open o WHERE o.age IS NULL HAVING count(*) > 0""",
    "no other is open",
)
def transactions(who: str, seconds: float | None) -> Verdict:
    """Vacuum must keep what was finished after the oldest one began, and claims walk over all of that."""
    if seconds is None:
        return Verdict(
            Level.UNSEEN, f"{who} of other roles are open, for how long?", "grant this role pg_read_all_stats"
        )
    advice = "it slows claims down: end it (pg_terminate_backend, ROLLBACK PREPARED), and find out who left it open"
    return Verdict(_above(seconds, 5 * _MINUTE, 60 * _MINUTE), f"the oldest is of {who}, for {age(seconds)}", advice)


@_check(
    "vacuum",
    """SELECT t.n_live_tup, t.n_dead_tup, extract(epoch FROM clock_timestamp() - t.last_autovacuum)::float8
       FROM pg_stat_all_tables t WHERE t.schemaname = 'commandbus' AND t.relname = 'command'""",
    "there is no table commandbus.command",
)
def vacuum(live: int, dead: int, since: float | None) -> Verdict:
    """Autovacuum begins at 1,000 and 2 % dead rows (0001_tables.sql); at ten times that it does not get through."""
    last = "none yet" if since is None else f"{age(since)} ago"
    found = f"{dead:,} dead rows beside {live:,} in commandbus.command; last autovacuum: {last}"
    advice = "see that autovacuum is on and no old transaction is open; then VACUUM commandbus.command"
    return Verdict(_above(dead, 10_000 + 0.2 * live), found, advice)


# -- the queue ---------------------------------------------------------------------------------------------------------


@_check(
    "queue",
    """SELECT c.domain, count(*), coalesce(extract(epoch FROM clock_timestamp() - min(greatest(c.sent_at, c.not_before))
                                                   FILTER (WHERE c.delivery = 0))::float8, 0)
       FROM commandbus.commands c WHERE c.finished_at IS NULL AND c.status = 'PENDING' GROUP BY 1 ORDER BY 1""",
    "no command is waiting for a worker",
)
def queue(domain: str, count: int, seconds: float) -> Verdict:
    """A command that could have run for ten minutes has been claimed at least once."""
    found = f"{domain}: {count:,} are PENDING; of those never claimed, the first could have run for {age(seconds)}"
    return Verdict(
        _above(seconds, 10 * _MINUTE), found, "add workers or concurrency; `commandbus show ID` says why one waits"
    )


@_check(
    "workers",
    """SELECT c.domain, c.command_type, count(*) FROM commandbus.commands c
       WHERE c.finished_at IS NULL AND (c.status = 'PENDING' OR c.due_at <= clock_timestamp()) AND NOT EXISTS (
           SELECT FROM commandbus.workers w
           WHERE w.alive AND w.domain = c.domain AND c.command_type = ANY (w.command_types))
       GROUP BY 1, 2 ORDER BY 1, 2""",
    "each type that waits is known to a living one",
)
def workers(domain: str, command_type: str, count: int) -> Verdict:
    """Whatever could run has a living worker that knows its type."""
    found = f"{domain}: no living worker knows {command_type}, of which {count:,} are waiting"
    return Verdict(
        Level.FAILURE, found, "start one with a handler for it (workers before 0.2 do not announce themselves)"
    )


@_check(
    "leases",
    """SELECT c.domain, count(*) FROM commandbus.commands c
       WHERE c.finished_at IS NULL AND c.status = 'IN_PROGRESS' AND c.lease_until < clock_timestamp() - interval '60 s'
       GROUP BY 1 ORDER BY 1""",
    "none has run out without being noticed",
)
def leases(domain: str, count: int) -> Verdict:
    """A worker looks for expired leases every ten seconds or so."""
    found = f"{domain}: {count:,} ran out more than a minute ago, and nobody has noticed"
    return Verdict(Level.WARNING, found, "start a worker for the domain: it counts the crashes, and takes over")


@_check(
    "parked",
    """SELECT t.domain, count(*), extract(epoch FROM clock_timestamp() - min(t.parked_at))::float8
       FROM commandbus.troubleshooting t WHERE t.finished_at IS NULL GROUP BY 1 ORDER BY 1""",
    "no command waits for an operator",
)
def parked(domain: str, count: int, seconds: float) -> Verdict:
    """Nothing waits for a person."""
    found = f"{domain}: {count:,} wait for an operator, the first for {age(seconds)}"
    return Verdict(Level.WARNING, found, f"commandbus troubleshooting list {domain}")


# -- the history -------------------------------------------------------------------------------------------------------

_WEEKS = """(
    SELECT d.name, to_date(d.name, 'IYYY"w"IW')::timestamp AT TIME ZONE 'UTC' AS week
    FROM pg_inherits i JOIN pg_class p ON p.oid = i.inhparent JOIN pg_class c ON c.oid = i.inhrelid
         CROSS JOIN LATERAL right(c.relname, 7) AS d(name)
    WHERE p.relnamespace = to_regnamespace('commandbus') AND p.relname = 'command_history') w"""


@_check("history", f"SELECT count(*), count(*) >= 2 FROM {_WEEKS} WHERE w.week > clock_timestamp()")  # noqa: S608 - ours
def history(ahead: int, enough: bool) -> Verdict:  # noqa: FBT001 - a column
    """Four weeks are made ahead: with fewer than two, nobody has been here for more than two weeks."""
    advice = "run a worker; until then, the first completion of a new week makes it"
    return Verdict(Level.OK if enough else Level.WARNING, f"{ahead} weeks are made ahead", advice)


@_check(
    "retention",
    f"""WITH past AS (SELECT clock_timestamp() - s.value::interval - interval '1 hour' AS at
                      FROM commandbus.setting s WHERE s.name = 'retention')
       SELECT 'the finished commands of ' || w.name FROM {_WEEKS}, past p WHERE w.week + interval '168 hours' < p.at
       UNION ALL SELECT 'finished batches' FROM past p
       WHERE EXISTS (SELECT FROM commandbus.batches b WHERE b.finished_at < p.at)
       UNION ALL SELECT 'finished processes' FROM past p
       WHERE EXISTS (SELECT FROM commandbus.processes c WHERE c.finished_at < p.at) ORDER BY 1""",  # noqa: S608 - ours
    "no week of the history is past it, no batch and no process",
)
def retention(what: str) -> Verdict:
    """What is finished is dropped within an hour after its retention is over."""
    advice = "run a worker; if one runs, its log names the sessions that hold a week"
    return Verdict(Level.WARNING, f"{what} are past it, and still there", advice)


# -- the role ----------------------------------------------------------------------------------------------------


@_check(
    "rights",
    """SELECT string_agg(p.verb, ', ' ORDER BY p.verb) FILTER (WHERE p.may),
              string_agg(p.verb, ', ' ORDER BY p.verb) FILTER (WHERE NOT p.may), bool_or(p.may AND p.verb = 'read')
       FROM (SELECT CASE f.proname WHEN 'send_v1' THEN 'send' WHEN 'claim_v1' THEN 'work' ELSE 'operate' END AS verb,
                    has_schema_privilege(f.pronamespace, 'USAGE') AND has_function_privilege(f.oid, 'EXECUTE') AS may
             FROM pg_proc f WHERE f.pronamespace = to_regnamespace('commandbus')
                              AND f.proname IN ('send_v1', 'claim_v1', 'operator_retry_v1')
             UNION ALL
             SELECT 'read', has_schema_privilege(v.relnamespace, 'USAGE') AND has_table_privilege(v.oid, 'SELECT')
             FROM pg_class v WHERE v.relnamespace = to_regnamespace('commandbus') AND v.relname = 'commands') p""",
)
def rights(allowed: str | None, denied: str | None, reads: bool | None) -> Verdict:  # noqa: FBT001 - a column
    """What the connected role may do; the other checks need it to read."""
    found = f"this role may {allowed or 'do nothing'}" + (f", and not {denied}" if denied else "")
    return Verdict(
        Level.OK if reads else Level.WARNING, found, "ask the owner of the database for the rights of a reader"
    )
