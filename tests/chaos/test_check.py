"""The check sees what it is there for: each test breaks one thing in a database where all was well."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from uuid import UUID

import pytest

from commandbus import BusinessRuleError, Command, CommandBus
from commandbus.handlers import BlockingContext
from commandbus.testing import Harness
from tests.bus.support import Connection, complete, expire, fail, lease, one
from tests.chaos import plan, records
from tests.chaos.behaviour import EFFECT
from tests.chaos.check import CHECKS, check
from tests.chaos.journal import Journal, read
from tests.chaos.plan import DOMAIN, TOLD, Planned
from tests.chaos.sender import Sender
from tests.chaos.worker import registry_of

STRANGER = UUID(int=1)


def sent(db: Connection, kind: str, way: str = "once") -> UUID:
    """A command that was planned, sent and acknowledged, and is not finished yet."""
    number = int(one(db, "SELECT count(*) FROM chaos.planned"))
    command_id = UUID(int=1000 + number)
    rows = f'[{{"domain":"{DOMAIN}","command_type":"{kind}","command_id":"{command_id}","data":{{"number":{number}}}}}]'
    db.execute("SELECT commandbus.send_v1(%s, NULL)", [rows])
    planned = Planned(number, command_id, kind, way, 0.0, {"number": number})
    records.keep_plan(db, plan.Plan(1, (1, 1, 1), 1.0, (planned,), ()))
    note(db, "sent", "sender-0", command_id, outcome="accepted")
    return command_id


def note(db: Connection, what: str, who: str, command_id: UUID, **more: object) -> None:
    records.keep_notes(db, [{"at": 4e9, "what": what, "who": who, "command_id": command_id, **more}])


def booked(db: Connection) -> UUID:
    """A transactional command that is done, with its effect."""
    command_id = sent(db, "Effect")
    complete(db, lease(db, "Effect", domain=DOMAIN), None, domain=DOMAIN)
    db.execute("INSERT INTO chaos.effect VALUES (%s, 1)", [command_id])
    return command_id


def parked(db: Connection, kind: str = "Broken") -> UUID:
    command_id = sent(db, kind)
    fail(db, lease(db, kind, domain=DOMAIN), "PERMANENT", domain=DOMAIN)
    return command_id


def cancel(db: Connection, command_id: UUID) -> None:
    db.execute("SELECT commandbus.operator_cancel_v1(%s, %s, 'operator-0', 'why')", [DOMAIN, command_id])


def canceled(db: Connection, kind: str = "Broken") -> UUID:
    """A parked command that an operator has cancelled, who says so."""
    command_id = parked(db, kind)
    cancel(db, command_id)
    note(db, "operator", "operator-0", command_id, verb="cancel", outcome="won")
    return command_id


def handle(command: Command, context: BlockingContext[object]) -> None:
    if context.connection is not None:
        context.connection.execute(EFFECT, (command.command_id, context.delivery))
    if command.command_type == "Refused":
        raise BusinessRuleError("REFUSED", "no")


async def play(dsn: str, folder: Path) -> plan.Plan:
    """Send in each of the ways that tell of an end, as a sender does, and run all to its end."""
    groups = {None: [("Plain", "replied"), ("Plain", "called")],
              UUID(int=1): [("Plain", "batch"), ("Refused", "batch")],
              UUID(int=2): [("Effect", "process"), ("Effect", "process"), ("Refused", "process")],
              UUID(int=3): [("Plain", "process"), ("Effect", "process")]}  # fmt: skip
    sends = [(group, *send) for group, sends in groups.items() for send in sends]
    planned = [Planned(number, UUID(int=number), kind, way, 0.0, {"number": number}, group)
               for number, (group, kind, way) in enumerate(sends, start=100)]  # fmt: skip
    drawn, journal = plan.Plan(1, (1, 1, 1), 1.0, tuple(planned), ()), Journal(folder, "sender-0")
    firsts = [each for each in planned if each.group is None or drawn.groups[each.group][0] is each]
    async with CommandBus(dsn) as bus, Harness(bus, registry_of(journal, handle, handle)) as harness:
        sender = Sender(bus, dsn, journal, drawn)
        sending = asyncio.gather(*(sender.send(each, 0) for each in firsts))
        while not sending.done():
            await harness.run_until_idle()
        await sending
        await harness.run_until_idle()
    return drawn


# ---------------------------------------------------------------------------------------------- what is broken


def lost(db: Connection) -> None:
    note(db, "sent", "sender-0", STRANGER, outcome="accepted")


def rolled_back_but_sent(db: Connection) -> None:
    db.execute("UPDATE chaos.planned SET way = 'rolled back' WHERE number = 0")


def withdrawn_but_sent(db: Connection) -> None:
    db.execute("UPDATE chaos.note SET outcome = 'withdrawn' WHERE command_id = (SELECT min(command_id::text)::uuid"
               " FROM chaos.planned)")  # fmt: skip


def accepted_twice(db: Connection) -> None:
    note(db, "sent", "sender-1", booked(db), outcome="accepted")


def nobody_sent(db: Connection) -> None:
    db.execute("DELETE FROM chaos.planned WHERE number = 0")


def unsettled(db: Connection) -> None:
    sent(db, "Plain")


def not_one_end(db: Connection) -> None:
    db.execute("INSERT INTO commandbus.command_history SELECT * FROM commandbus.command_history LIMIT 1")


def wrong_end(db: Connection) -> None:
    sent(db, "Plain")
    fail(db, lease(db, "Plain", domain=DOMAIN), "BUSINESS", domain=DOMAIN)


def too_many_attempts(db: Connection) -> None:
    db.execute("UPDATE commandbus.command_history SET attempts = 5")


def too_many_crashes(db: Connection) -> None:
    db.execute("UPDATE commandbus.command_history SET crashes = 4")


def double_effect(db: Connection) -> None:
    db.execute("INSERT INTO chaos.effect SELECT * FROM chaos.effect LIMIT 1")


def effect_without_completion(db: Connection) -> None:
    db.execute("INSERT INTO chaos.effect VALUES (%s, 1)", [canceled(db)])


def completion_without_effect(db: Connection) -> None:
    db.execute("DELETE FROM chaos.effect")


def poison_not_parked(db: Connection) -> None:
    sent(db, "Exit")
    complete(db, lease(db, "Exit", domain=DOMAIN), None, domain=DOMAIN)


def innocent_parked(db: Connection) -> None:
    """Parked by three crashes, none of which a fault explains."""
    command_id = sent(db, "Plain")
    for crash in range(3):
        if crash < 2:
            lease(db, "Plain", domain=DOMAIN)
        else:
            db.execute("SELECT commandbus.claim_v1(%s, '[[\"Plain\", -1, 0]]', 1, 'w', 60, false, true)", [DOMAIN])
        expire(db, command_id, domain=DOMAIN)
    cancel(db, command_id)
    note(db, "operator", "operator-0", command_id, verb="cancel", outcome="won")


def stale_write_accepted(db: Connection) -> None:
    command_id = sent(db, "Zombie")
    lease(db, "Zombie", domain=DOMAIN)
    expire(db, command_id, domain=DOMAIN)
    note(db, "foreign", "foreign", command_id, delivery=1, verb="complete", outcome="done")
    complete(db, lease(db, "Zombie", domain=DOMAIN), None, domain=DOMAIN)


def action_without_one_event(db: Connection) -> None:
    note(db, "operator", "operator-1", canceled(db), verb="retry", outcome="won")


def event_without_action(db: Connection) -> None:
    cancel(db, parked(db))


def not_one_reply(db: Connection) -> None:
    db.execute("DELETE FROM commandbus.command_history WHERE domain = %s AND command_type = 'Reply'", [TOLD])


def reply_not_handled_once(db: Connection) -> None:
    db.execute("INSERT INTO chaos.reply SELECT * FROM chaos.reply")


def called_otherwise(db: Connection) -> None:
    db.execute("UPDATE chaos.note SET outcome = 'FAILED' WHERE what = 'called'")


def called_without_return(db: Connection) -> None:
    db.execute("DELETE FROM chaos.note WHERE what = 'called'")


def batch_miscounted(db: Connection) -> None:
    db.execute("UPDATE commandbus.batch SET completed = 2, failed = 0")


def batch_not_ended_once(db: Connection) -> None:
    db.execute("INSERT INTO commandbus.command_history SELECT * FROM commandbus.command_history"
               " WHERE command_type = 'Announce'")  # fmt: skip


def batch_end_not_handled(db: Connection) -> None:
    db.execute("DELETE FROM chaos.note WHERE what = 'announced'")


def process_unexplained(db: Connection) -> None:
    """Undone in the order in which it was done."""
    db.execute("UPDATE commandbus.process_step SET of_number = 3 - of_number WHERE kind = 'undo'")


def step_twice(db: Connection) -> None:
    number = one(db, "SELECT max(number) FROM chaos.planned WHERE way = 'process' AND kind = 'Effect'")
    rows = f'[{{"domain":"{DOMAIN}","command_type":"Effect","command_id":"{STRANGER}","data":{{"number":{number}}}}}]'
    db.execute("SELECT commandbus.send_v1(%s, NULL)", [rows])


def effect_twice(db: Connection) -> None:
    """Under another id, which the fence of a command cannot see."""
    db.execute("""UPDATE commandbus.command_history SET data = data || '{"number": 0}' WHERE command_type = 'Effect'""")


BREAKS: dict[str, Callable[[Connection], None]] = {
    function.__name__: function
    for function in (
        lost, rolled_back_but_sent, withdrawn_but_sent, accepted_twice, nobody_sent, unsettled, not_one_end, wrong_end,
        too_many_attempts, too_many_crashes, double_effect, effect_without_completion, completion_without_effect,
        poison_not_parked, innocent_parked, stale_write_accepted, action_without_one_event, event_without_action,
    )
}  # fmt: skip
BREAKS_OF_ENDS: dict[str, Callable[[Connection], None]] = {
    function.__name__: function
    for function in (
        not_one_reply, reply_not_handled_once, called_otherwise, called_without_return, batch_miscounted,
        batch_not_ended_once, batch_end_not_handled, process_unexplained, step_twice, effect_twice,
    )
}  # fmt: skip


@pytest.fixture
def sound(db: Connection) -> Connection:
    """What a run leaves in which all was well."""
    records.make(db)
    booked(db)
    canceled(db)
    return db


@pytest.fixture
def ended(sound: Connection, dsn: str, tmp_path: Path) -> Connection:
    """The same, with a reply, a call, a batch, and a process of each end."""
    records.keep_plan(sound, asyncio.run(play(dsn, tmp_path)))
    records.keep_notes(sound, read(tmp_path))
    return sound


def violations(db: Connection) -> set[str]:
    return {found.violation for found in check(db)}


def test_where_all_was_well_nothing_is_found(sound: Connection) -> None:
    assert violations(sound) == set()


@pytest.mark.corrupts
@pytest.mark.parametrize("name", BREAKS)
def test_each_check_sees_what_it_is_named_for(sound: Connection, name: str) -> None:
    BREAKS[name](sound)
    assert name in violations(sound)


def test_where_all_has_ended_well_nothing_is_found(ended: Connection) -> None:
    assert violations(ended) == set()


@pytest.mark.corrupts
@pytest.mark.parametrize("name", BREAKS_OF_ENDS)
def test_each_check_of_ends_sees_what_it_is_named_for(ended: Connection, name: str) -> None:
    BREAKS_OF_ENDS[name](ended)
    assert name in violations(ended)


def test_each_check_has_its_test() -> None:
    assert {**BREAKS, **BREAKS_OF_ENDS}.keys() == CHECKS.keys()


def test_an_innocent_that_a_fault_explains_is_none(sound: Connection) -> None:
    sound.execute("INSERT INTO chaos.fault VALUES ('freeze all', '-infinity', 'infinity', NULL)")
    innocent_parked(sound)
    assert violations(sound) == set()


def test_an_innocent_whose_worker_was_too_slow_to_renew_is_none(sound: Connection) -> None:
    innocent_parked(sound)
    note(sound, "late", "worker-1", UUID(one(sound, "SELECT max(command_id::text) FROM chaos.planned")), delivery=3)
    assert violations(sound) == set()


@pytest.mark.corrupts
def test_what_verify_finds_and_what_was_seen_on_the_way_is_told_too(sound: Connection) -> None:
    sound.execute("UPDATE commandbus.command_history SET crashes = 1")
    records.keep_blame(sound, [("worker_exited", "worker-1 ended with 1")])
    note(sound, "blame", "operator-1", STRANGER, verb="operator_error", outcome="ValueError: no")
    assert violations(sound) == {"verify: wrong_crashes", "worker_exited", "operator_error"}
