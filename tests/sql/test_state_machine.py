"""Random lives of commands, in the database and in a model of it, compared after every call.

A run is up to 50 calls about two domains and two types of commands; an hour of the test clock is a tick. 200 runs make
about 9,700 calls. Of them 69 % change something; the others are what must be refused and change nothing: stale and
forged leases, decisions that come too late, ids that are known. About 100 commands crash three times, and as many are
retried by an operator.

One rule draws every call. With a rule for each verb Hypothesis turns half of them off in a run ("swarm testing"), most
often the claim or what depends on it: 49 % of the calls changed something, and no command was ever retried.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from math import ceil
from typing import Any, TypeVar
from uuid import UUID

import pytest
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)
from psycopg.rows import dict_row

from tests.sql.model import DECISIONS, PARKED, TERMINAL, UNFINISHED, Command, Key, Lease, Model
from tests.sql.support import KINDS, Connection, Row, empty, segments, sqlstate

T = TypeVar("T")
Method = Callable[..., None]

TICK = 3600  # seconds
DOMAINS = ("d", "e")
TYPES = ("A", "B")

# Times as ticks since the start of the run. A FULL JOIN: no event without its command either.
_THERE = """
SELECT c.domain, c.command_id::text, c.command_type, c.status, c.priority, c.max_attempts, c.attempts, c.crashes,
       c.delivery, c.data, c.error ->> 'code', c.result,
       floor(extract(epoch FROM c.due_at - %(start)s) / 3600 + 0.5)::int,
       floor(extract(epoch FROM c.lease_until - %(start)s) / 3600 + 0.5)::int,
       c.finished_at IS NOT NULL, t.one_by_one, t.steps
FROM commandbus.commands c
FULL JOIN (SELECT a.domain, a.command_id, count(DISTINCT a.step) = count(*) AS one_by_one,
                  jsonb_agg(jsonb_build_array(a.event, a.from_status, a.to_status, a.delivery, a.attempt,
                                              a.lease_token, a.operator) ORDER BY a.step) AS steps
           FROM commandbus.audit_trail a GROUP BY a.domain, a.command_id) t
  ON (t.domain, t.command_id) = (c.domain, c.command_id)
ORDER BY 1, 2"""


def seconds(ticks: int) -> float:
    """A duration that is over when the clock has ticked this often."""
    return max(0, ticks * TICK - TICK // 2)


def drawn(choices: Callable[[Model], Sequence[T]]) -> st.SearchStrategy[T]:
    """One of what the model has at this moment."""
    return st.runner().flatmap(lambda machine: st.sampled_from(choices(machine.model)))


VERBS: list[tuple[Callable[[Model], object], st.SearchStrategy[tuple[str, Row]]]] = []


def verb(
    needs: Callable[[Model], object], *, weight: int = 1, **arguments: st.SearchStrategy[Any]
) -> Callable[[Method], Method]:
    """Mark a method as a call that a step may make, when the model has what it needs."""

    def mark(method: Method) -> Method:
        VERBS.extend([(needs, st.tuples(st.just(method.__name__), st.fixed_dictionaries(arguments)))] * weight)
        return method

    return mark


def always(_: Model) -> bool:
    return True


def keys(*statuses: str) -> Callable[[Model], list[Key]]:
    return lambda model: [command.key for command in model.having(*statuses)]


def some(choices: Callable[[Model], Sequence[Lease]]) -> st.SearchStrategy[list[Lease]]:
    """What one call presents: no command twice."""
    return st.runner().flatmap(
        lambda machine: st.lists(
            st.sampled_from(choices(machine.model)), min_size=1, max_size=3, unique_by=lambda lease: lease.command_id
        )
    )


domains, types, ticks = st.sampled_from(DOMAINS), st.sampled_from(TYPES), st.integers(1, 3)
numbers = st.integers(0, 2)
commands = st.fixed_dictionaries(
    {
        "domain": domains,
        "command_type": types,
        "data": numbers,
        "delay": st.sampled_from((0, 0, 1, 2)),
        "priority": st.sampled_from((0, 0, 5, -5)),
        "max_attempts": st.sampled_from((None, None, 1, 2)),
        "id_from": st.sampled_from(("caller", "library", "database")),
    }
)
batches = st.lists(commands, min_size=1, max_size=2)


def possible(machine: LifeOfCommands) -> st.SearchStrategy[tuple[str, Row]]:
    """The calls that can be made now."""
    return st.sampled_from([call for needs, call in VERBS if needs(machine.model)]).flatmap(lambda call: call)


class LifeOfCommands(RuleBasedStateMachine):
    """The calls; each is made in the database and in the model, and their answers compared."""

    def __init__(self, db: Connection) -> None:
        super().__init__()
        self.db = db
        self.model = Model()
        self.ids = 0
        empty(db)
        self._set_clock()
        self.start = self.rows("SELECT commandbus.clock()")[0][0]

    def rows(self, sql: str, *args: object) -> list[tuple[Any, ...]]:
        return self.db.execute(sql.encode(), args).fetchall()

    def _set_clock(self) -> None:
        self.rows("SELECT set_config('commandbus.clock_offset', %s, false)", f"{self.model.now * TICK} seconds")

    @invariant()
    def the_database_is_as_the_model_says(self) -> None:
        there = self.db.execute(_THERE, {"start": self.start}).fetchall()
        assert there == sorted(expected(command) for command in self.model.commands.values())

    @rule(call=st.runner().flatmap(possible))
    def step(self, call: tuple[str, Row]) -> None:
        name, arguments = call
        getattr(self, name)(**arguments)

    # ------------------------------------------------------------------------------------------- sending

    @initialize(batch=st.lists(commands, min_size=4, max_size=6))
    def begin(self, batch: list[Row]) -> None:
        self.send(batch)
        for domain in DOMAINS:
            self._claim(domain, TYPES, 2, 2, sweep=False, alone=False)

    @verb(always, batch=batches)
    def send(self, batch: list[Row]) -> None:
        given = [self._given(**one) for one in batch]
        for (command_id, outcome), one in zip(self._send(given), given, strict=True):
            named: Row = {**one, "command_id": command_id}
            assert one.get("command_id", command_id) == command_id
            assert outcome == self.model.send(**named) == "accepted"
        self.model.calls += 1

    @verb(
        Model.known,
        key=drawn(Model.known),
        change=st.sampled_from(("nothing", "data", "type", "edited")),
    )
    def send_again(self, key: Key, change: str) -> None:
        known = self.model.commands[key]
        command_type, data = known.sent
        if change == "type":
            command_type = TYPES[1 - TYPES.index(command_type)]
        data = {"data": data + 1, "edited": known.data}.get(change, data)
        one: Row = {"domain": known.domain, "command_id": known.command_id, "command_type": command_type, "data": data}
        assert self._send([one]) == [(known.command_id, self.model.send(**one))]

    def _send(self, given: list[Row]) -> list[tuple[Any, ...]]:
        in_seconds = [one | {"delay": seconds(one.get("delay", 0))} for one in given]
        sql = "SELECT command_id::text, outcome FROM commandbus.send_v1(%s) ORDER BY ordinal"
        return self.rows(sql, json.dumps(in_seconds))

    def _given(self, *, id_from: str, **more: object) -> Row:
        self.ids += 1
        own: Row = (
            {} if id_from == "database" else {"command_id": str(UUID(int=self.ids)), "minted": id_from == "library"}
        )
        return own | more

    # ------------------------------------------------------------------------------------ time and claims

    @verb(always, times=ticks)
    def tick(self, times: int) -> None:
        self.model.now += times
        self._set_clock()

    @verb(Model.live, weight=3, domain=domains)
    def outlive_leases(self, domain: str) -> None:
        self.tick(3)
        self._claim(domain, TYPES, 2, 1, sweep=True, alone=False)
        self._claim(domain, TYPES, 2, 1, sweep=False, alone=True)

    @verb(
        always,
        domain=domains,
        names=st.sampled_from((("A",), ("B",), TYPES)),
        limit=st.integers(0, 4),
        sweep=st.booleans(),
        alone=st.booleans(),
    )
    def look_for_work(self, *, domain: str, names: tuple[str, ...], limit: int, sweep: bool, alone: bool) -> None:
        self._claim(domain, names, limit, 2, sweep=sweep, alone=alone)

    @verb(Model.ready, weight=2, one=drawn(Model.ready), others=st.booleans(), limit=st.integers(1, 4), lease=ticks)
    def claim(self, one: Command, limit: int, lease: int, *, others: bool) -> None:
        self._claim(one.domain, TYPES if others else (one.command_type,), limit, lease, sweep=others, alone=one.alone)

    def _claim(self, domain: str, names: tuple[str, ...], limit: int, lease: int, *, sweep: bool, alone: bool) -> None:
        if sweep:
            self.model.sweep(domain)
        self.model.promote(domain)
        first = self.model.first(domain, names, 1 if alone else limit, alone=alone)
        if alone and len(first) > 1:
            alone, first = False, self.model.first(domain, names, limit, alone=False)
        args = [domain, segments(*names), max(limit, len(first)), "w1", seconds(lease), sweep, alone]
        sql = "SELECT * FROM commandbus.claim_v1(%s, %s, %s, %s, %s, %s, %s)"
        *rows, last = self.db.cursor(row_factory=dict_row).execute(sql, args).fetchall()
        leased = {str(row["command_id"]): row for row in rows}
        assert leased.keys() == {command.command_id for command in first}
        for command in first:
            row = leased[command.command_id]
            assert str(row["lease_token"]) not in {given.token for given in self.model.leases}
            self.model.claim(command, str(row["lease_token"]), lease)
            for name in ("command_type", "priority", "max_attempts", "attempts", "crashes", "delivery"):
                assert row[name] == getattr(command, name), name
            assert row["data"] == str(command.data)
        self._check_hints(domain, names, last)

    @verb(Model.ready, domain=domains, lease=ticks)
    def look_ahead(self, domain: str, lease: int) -> None:
        self.model.promote(domain)
        sure, perhaps = self.model.ahead(domain, TYPES)
        sql = """SELECT command_id::text, lease_token::text
                 FROM commandbus.work_v1(%s, '[]', %s, 99, 'w1', %s, false, false, 99) WHERE command_id IS NOT NULL"""
        leased = dict(self.rows(sql, domain, segments(*TYPES), seconds(lease)))
        assert {command.command_id for command in sure} <= leased.keys()
        for command in [*sure, *perhaps]:
            if token := leased.pop(command.command_id, None):
                self.model.claim(command, token, lease, ahead=True)
        assert leased == {}

    def _check_hints(self, domain: str, names: Sequence[str], last: Row) -> None:
        assert last["command_id"] is None
        due = last["next_due"]
        assert (None if due is None else ceil(due / TICK)) == self.model.next_due(domain)
        since = {command.waits_since for command in self.model.line(domain, names, alone=True)}
        if since != {self.model.now}:  # it is told after a second
            assert last["alone_waiting"] is bool(since)

    # -------------------------------------------------------------------------------------- holding a lease

    @verb(Model.live, leases=some(Model.live), times=ticks)
    def renew(self, leases: list[Lease], times: int) -> None:
        self._present("renew_v1(%s, %s, %s)", leases, lambda lease: self.model.renew(lease, times), seconds(times))

    @verb(Model.live, leases=some(Model.live), result=numbers)
    def complete(self, leases: list[Lease], result: int) -> None:
        self._present("complete_v1(%s, %s)", leases, lambda lease: self.model.complete(lease, result), result=result)

    @verb(
        Model.live,
        leases=some(Model.live),
        kind=st.sampled_from(KINDS),
        retry_in=st.integers(0, 2),
        limit=st.integers(1, 3),
    )
    def fail(self, leases: list[Lease], kind: str, retry_in: int, limit: int) -> None:
        self._present(
            "fail_v1(%s, %s)", leases, lambda lease: self.model.fail(lease, kind, "X", retry_in, limit),
            kind=kind, error={"code": "X", "message": "m"}, retry_in=seconds(retry_in), max_attempts=limit,
        )  # fmt: skip

    @verb(Model.live, leases=some(Model.live))
    def release(self, leases: list[Lease]) -> None:
        self._present("release_v1(%s, %s)", leases, self.model.release)

    @verb(
        Model.presentable,
        leases=some(Model.presentable),
        verb=st.sampled_from(("renew", "complete", "fail", "release")),
        kind=st.sampled_from(KINDS),
    )
    def present_any_lease(self, leases: list[Lease], verb: str, kind: str) -> None:
        match verb:
            case "renew":
                self.renew(leases, 3)
            case "complete":
                self.complete(leases, 0)
            case "fail":
                self.fail(leases, kind, 1, 2)
            case _:
                self.release(leases)

    def _present(
        self, call: str, leases: list[Lease], promised: Callable[[Lease], str], *args: object, **more: object
    ) -> None:
        for domain in sorted({lease.domain for lease in leases}):
            named = [lease for lease in leases if lease.domain == domain]
            items = [
                {"command_id": lease.command_id, "delivery": lease.delivery, "lease_token": lease.token, **more}
                for lease in named
            ]
            answer = self.rows(
                f"SELECT command_id::text, outcome FROM commandbus.{call}", domain, json.dumps(items), *args
            )
            assert dict(answer) == {lease.command_id: promised(lease) for lease in named}
        self.model.calls += 1

    # ----------------------------------------------------------------------------------- people's verbs

    @verb(keys(*UNFINISHED), key=drawn(keys(*UNFINISHED)))
    def cancel(self, key: Key) -> None:
        self._decide("cancel", key, None)

    @verb(keys(PARKED), weight=3, key=drawn(keys(PARKED)), name=st.sampled_from(("operator_retry", *DECISIONS)),
          value=st.none() | numbers)  # fmt: skip
    def decide(self, key: Key, name: str, value: int | None) -> None:
        self._decide(name, key, value)

    @verb(always, decision=drawn(Model.refusals))
    def decide_too_early_or_too_late(self, decision: tuple[str, Key]) -> None:
        self._decide(*decision, 1)

    def _decide(self, verb: str, key: Key, value: int | None) -> None:
        args: list[str | None] = [*key, "ana", "why"]
        if verb in {"operator_complete", "operator_retry"}:
            args.append(None if value is None else str(value))
        call = f"SELECT commandbus.{verb}_v1({', '.join(['%s'] * len(args))})"
        assert sqlstate(lambda: self.rows(call, *args)) == self.model.decide(verb, key, value)


def expected(command: Command) -> tuple[object, ...]:
    """The row of `_THERE` that this command must have."""
    return (
        command.domain, command.command_id, command.command_type, command.status, command.priority,
        command.max_attempts, command.attempts, command.crashes, command.delivery, command.data, command.error,
        command.result, command.due, command.lease_until, command.status in TERMINAL,
        True, [list(step) for step in command.trail],
    )  # fmt: skip


@pytest.fixture
def dsn(emptied_dsn: str) -> str:
    return emptied_dsn


@pytest.mark.timeout(600)  # on a machine that does much else
def test_random_lives_are_as_the_model_says(db: Connection, request: pytest.FixtureRequest) -> None:
    @seed(request.config.getoption("randomly_seed", 0))
    def machine() -> LifeOfCommands:
        return LifeOfCommands(db)

    db.execute("UPDATE commandbus.setting SET value = 'on' WHERE name = 'test_clock'")
    # That a mutant fails is enough; how little it takes is not asked.
    phases = (Phase.generate,) if request.config.getoption("mutant") else (Phase.generate, Phase.shrink)
    how = settings(
        max_examples=5000 if request.config.getoption("long") else 200, stateful_step_count=50, phases=phases,
        deadline=None, database=None, print_blob=True, suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    run_state_machine_as_test(machine, settings=how)  # type: ignore[arg-type]  # a factory will do, says its docstring
