"""Transactional `def` handlers, in both workers: what they write and their completion are one transaction."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from commandbus import BusinessRuleError, Command, CommandBus, CommandStatus, SendRequest, Worker
from commandbus._database import Database
from commandbus.handlers import BlockingContext
from commandbus.sync import SyncCommandBus, SyncHandlerContext, SyncRuntime
from commandbus.worker.transactions import BlockingConnections
from tests.bus.support import DOMAIN, Connection, complete, expire, lease, one, terminate
from tests.support import eventually
from tests.sync.support_worker import HOUR, LEASE, PARKED, Waiting, all_settled, registry_of, settled, story, working
from tests.worker.support import running
from tests.worker.support import settled as asettled


@pytest.fixture(autouse=True)
def _ledger(db: Connection) -> None:
    db.execute("CREATE TABLE ledger (command_id uuid NOT NULL, delivery bigint NOT NULL, note text)")


@pytest.fixture
def waiting() -> Iterator[Waiting]:
    """A handler that waits; let go at the end in any case."""
    found = Waiting()
    yield found
    found.go_on.set()


def write(context: BlockingContext[Any], note: str = "") -> psycopg.Connection[Any]:
    """Write to the ledger, in the handler's transaction."""
    assert context.connection is not None
    values = [context.command.command_id, context.delivery, note]
    context.connection.execute("INSERT INTO ledger VALUES (%s, %s, %s)", values)
    return context.connection


def ledger(db: Connection) -> int:
    return int(one(db, "SELECT count(*) FROM ledger"))


def handler_sessions(db: Connection) -> set[int]:
    """The sessions of this database that have reset themselves last: those of transactional handlers that are idle."""
    query = "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND query LIKE 'RESET SESSION%%'"
    return {row[0] for row in db.execute(query.encode())}


# ------------------------------------------------------------------------------------------ both workers


def test_effects_and_completion_commit_together(bus: SyncCommandBus, db: Connection) -> None:
    def debit(command: Command, context: SyncHandlerContext) -> Any:  # noqa: ANN401 - any JSON
        connection = write(context)
        assert ledger(db) == 0  # nobody sees it yet
        with connection.transaction():
            write(context, "in a savepoint")
        return command.data

    with working(bus, registry_of(transactional=True, Debit=debit)):
        command = settled(bus, bus.send(DOMAIN, "Debit", {"a": 1}))
    assert (command.status, command.result, command.attempts) == (CommandStatus.COMPLETED, {"a": 1}, 1)
    history = one(db, "SELECT tableoid::regclass::text FROM commandbus.command_history")
    ours = one(db, "SELECT xmin::text FROM ledger WHERE note = ''")
    assert one(db, f"SELECT xmin::text FROM {history}") == ours
    assert ledger(db) == 2


async def test_the_async_worker_runs_them_as_well(dsn: str, db: Connection) -> None:
    contexts: list[BlockingContext[CommandBus]] = []

    def debit(command: Command, context: BlockingContext[CommandBus]) -> Any:  # noqa: ANN401 - any JSON
        contexts.append(context)
        assert threading.current_thread() is not threading.main_thread()
        write(context)
        if command.data == "refused":
            raise BusinessRuleError("NO_MONEY")
        return command.data

    async with CommandBus(dsn) as bus, running(Worker(bus, DOMAIN, registry_of(transactional=True, Debit=debit))):
        good = await asettled(bus, await bus.send(DOMAIN, "Debit", "good"))
        bad = await asettled(bus, await bus.send(DOMAIN, "Debit", "refused"))
        assert all(context.bus is bus for context in contexts)
    assert (good.status, good.result, bad.status) == (CommandStatus.COMPLETED, "good", CommandStatus.FAILED)
    assert ledger(db) == 1


# ----------------------------------------------------------------------------------------------- failure


@pytest.mark.parametrize(
    ("error", "status", "attempts"),
    [(ValueError("broken"), PARKED, 3), (BusinessRuleError("NO_MONEY"), CommandStatus.FAILED, 1)],
    ids=["ValueError", "BusinessRuleError"],
)
def test_an_error_rolls_the_effects_back(
    bus: SyncCommandBus, db: Connection, error: Exception, status: CommandStatus, attempts: int
) -> None:
    def debit(command: Command, context: SyncHandlerContext) -> None:
        write(context)
        raise error

    with working(bus, registry_of(transactional=True, Debit=debit)):
        command = settled(bus, bus.send(DOMAIN, "Debit", {}))
    assert (command.status, command.attempts) == (status, attempts)
    assert ledger(db) == 0


def test_a_refusal_at_commit_is_the_handlers_failure(bus: SyncCommandBus, db: Connection) -> None:
    def debit(command: Command, context: SyncHandlerContext) -> None:
        write(context).execute("INSERT INTO debt VALUES (%s)", [command.command_id])

    db.execute("CREATE TABLE known (id uuid PRIMARY KEY)")
    db.execute("CREATE TABLE debt (id uuid REFERENCES known DEFERRABLE INITIALLY DEFERRED)")
    with working(bus, registry_of(transactional=True, Debit=debit)):
        command = settled(bus, bus.send(DOMAIN, "Debit", {}))
    assert (command.status, command.attempts) == (PARKED, 3)
    assert command.error is not None
    assert command.error.code == "ForeignKeyViolation"
    assert ledger(db) == 0


@pytest.mark.parametrize("statements", [["COMMIT"], ["ROLLBACK"], ["COMMIT", "BEGIN"]], ids=" ".join)
def test_a_handler_that_ends_the_transaction_itself_is_parked(
    bus: SyncCommandBus, db: Connection, statements: list[str]
) -> None:
    def debit(command: Command, context: SyncHandlerContext) -> str:
        connection = write(context)
        for statement in statements:
            connection.execute(statement.encode())
        return "done"

    def good(command: Command, context: SyncHandlerContext) -> str:
        write(context)
        return "good"

    registry = registry_of(transactional=True, Debit=debit, Good=good)
    with working(bus, registry, transactional_connections=1):
        command = settled(bus, bus.send(DOMAIN, "Debit", {}))
        assert settled(bus, bus.send(DOMAIN, "Good", {})).result == "good"
    assert (command.status, command.attempts, command.delivery) == (PARKED, 1, 1)
    assert command.error is not None
    assert command.error.code == "TRANSACTION_ENDED"


def test_psycopg_refuses_commit_and_rollback(bus: SyncCommandBus, db: Connection) -> None:
    def debit(command: Command, context: SyncHandlerContext) -> None:
        getattr(write(context), command.data)()

    with working(bus, registry_of(transactional=True, Debit=debit)):
        for call in ("commit", "rollback"):
            command = settled(bus, bus.send(DOMAIN, "Debit", call, max_attempts=1))
            assert command.error is not None
            assert command.error.code == "ProgrammingError"
    assert ledger(db) == 0


# ------------------------------------------------------------------------------------------ lost leases


@pytest.mark.parametrize("lease_of_the_first", [LEASE, HOUR], ids=["it notices", "the fence notices"])
def test_a_lost_lease_rolls_the_effects_back(
    bus: SyncCommandBus, db: Connection, waiting: Waiting, lease_of_the_first: timedelta
) -> None:
    def debit(command: Command, context: SyncHandlerContext) -> str:
        write(context, "by the loser")
        return waiting.handler(command, context)

    with working(bus, registry_of(transactional=True, Debit=debit), lease=lease_of_the_first):
        receipt = bus.send(DOMAIN, "Debit", {})
        waiting.started()
        with db.transaction():  # the worker itself must not be the one that takes over
            expire(db, receipt.command_id)
            owner = lease(db, "Debit", seconds=3600)
        if lease_of_the_first == LEASE:
            eventually(lambda: waiting.contexts[0].cancelled, what="the worker to notice")
        waiting.go_on.set()
    assert complete(db, owner, "by its owner") == "done"
    assert bus.get_command(receipt).result == "by its owner"
    assert ledger(db) == 0


def test_a_timeout_rolls_the_effects_back_whenever_the_handler_returns(
    bus: SyncCommandBus, db: Connection, waiting: Waiting
) -> None:
    threads: list[threading.Thread] = []

    def debit(command: Command, context: SyncHandlerContext) -> str:
        threads.append(threading.current_thread())
        write(context)
        return waiting.handler(command, context)

    registry = registry_of(transactional=True, timeout=timedelta(milliseconds=50), Debit=debit)
    with working(bus, registry):
        receipt = bus.send(DOMAIN, "Debit", {}, max_attempts=1)
        command = settled(bus, receipt)
        assert command.error is not None
        assert command.error.code == "TIMEOUT"
        waiting.go_on.set()
    threads[0].join(30)
    assert story(bus, receipt) == ["SENT", "CLAIMED", "PARKED"]
    assert ledger(db) == 0


def test_a_connection_lost_at_commit_leaves_the_effects_once(bus: SyncCommandBus, db: Connection) -> None:
    """The outcome is unknown then: the lease is released, and the fence lets that pass only if nothing was kept."""
    db.execute("CREATE TABLE gate (shut int)")
    db.execute("INSERT INTO gate VALUES (1)")
    db.execute(
        "CREATE FUNCTION at_commit() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
        "WHILE EXISTS (SELECT FROM gate) LOOP PERFORM pg_sleep(0.005); END LOOP; RETURN NULL; END $$"
    )
    db.execute(
        "CREATE CONSTRAINT TRIGGER at_commit AFTER INSERT ON ledger DEFERRABLE INITIALLY DEFERRED "
        "FOR EACH ROW EXECUTE FUNCTION at_commit()"
    )

    def debit(command: Command, context: SyncHandlerContext) -> int:
        write(context)
        return context.delivery

    with working(bus, registry_of(transactional=True, Debit=debit)):
        receipt = bus.send(DOMAIN, "Debit", {})
        eventually(lambda: terminate(db, "COMMIT"), what="the commit")
        db.execute("DELETE FROM gate")
        command = settled(bus, receipt)
    assert (command.status, command.result, command.attempts) == (CommandStatus.COMPLETED, 2, 1)
    assert story(bus, receipt) == ["SENT", "CLAIMED", "RELEASED", "CLAIMED", "COMPLETED"]
    assert ledger(db) == 1


# ------------------------------------------------------------------------------------------- connections


def test_a_connection_is_used_again_and_forgets_what_was_set(bus: SyncCommandBus) -> None:
    def setting(command: Command, context: SyncHandlerContext) -> list[Any]:
        assert context.connection is not None
        found = context.connection.execute("SELECT pg_backend_pid(), current_setting('my.own', true)").fetchone()
        context.connection.execute("SELECT set_config('my.own', 'left behind', false)")
        return list(found or ())

    with working(bus, registry_of(transactional=True, Look=setting), transactional_connections=1):
        first, second = (settled(bus, bus.send(DOMAIN, "Look", n)).result for n in range(2))
    assert first[0] == second[0]
    assert second[1] in {None, ""}


@pytest.mark.parametrize("pooled", [False, True], ids=["direct", "pooled"])
async def test_only_a_session_of_our_own_is_reset(dsn: str, pooler: str, db: Connection, pooled: bool) -> None:  # noqa: FBT001
    """Behind a pooler it would be that of somebody else."""
    route = make_conninfo(pooler, dbname=conninfo_to_dict(dsn)["dbname"]) if pooled else dsn
    database = Database(route, connections=1, application_name="test", transaction_pooler=pooled)
    connections = BlockingConnections(database)
    with connections.transaction(lambda _: True) as connection:
        connection.execute("SELECT 1")
    assert len(handler_sessions(db)) == (0 if pooled else 1)
    connections.close()


def test_they_work_behind_a_pooler(dsn: str, pooler: str, runtime: SyncRuntime, db: Connection) -> None:
    pooled = make_conninfo(pooler, dbname=conninfo_to_dict(dsn)["dbname"])
    bus = SyncCommandBus(pooled, runtime=runtime, transaction_pooler=True)

    def debit(command: Command, context: SyncHandlerContext) -> None:
        write(context)

    with working(bus, registry_of(transactional=True, Debit=debit)):
        for command in all_settled(bus, [bus.send(DOMAIN, "Debit", n) for n in range(10)]):
            assert (command.status, command.delivery) == (CommandStatus.COMPLETED, 1)
    assert ledger(db) == 10


def test_not_more_run_at_once_than_there_are_connections(bus: SyncCommandBus, db: Connection) -> None:
    lock, now, most = threading.Lock(), 0, 0

    def debit(command: Command, context: SyncHandlerContext) -> None:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        write(context).execute("SELECT pg_sleep(0.005)")
        with lock:
            now -= 1

    sent = bus.send_batch([SendRequest(DOMAIN, "Debit", n) for n in range(40)])
    registry = registry_of(transactional=True, Debit=debit)
    with working(bus, registry, transactional_connections=3, thread_pool_size=8):
        assert {command.delivery for command in all_settled(bus, sent)} == {1}
        assert len(handler_sessions(db)) <= 3
    assert most == 3
    assert ledger(db) == 40


def test_an_idle_connection_that_the_server_has_closed_costs_no_attempt(bus: SyncCommandBus, db: Connection) -> None:
    def debit(command: Command, context: SyncHandlerContext) -> int:
        write(context)
        return context.attempt

    with working(bus, registry_of(transactional=True, Debit=debit), transactional_connections=1):
        settled(bus, bus.send(DOMAIN, "Debit", {}))
        assert len(eventually(lambda: terminate(db, "RESET SESSION"), what="the end of the session")) == 1
        eventually(lambda: not handler_sessions(db), what="the end of the session")
        assert settled(bus, bus.send(DOMAIN, "Debit", {})).result == 1
    assert ledger(db) == 2


def test_no_connection_is_left_when_the_worker_has_stopped(bus: SyncCommandBus, db: Connection) -> None:
    def debit(command: Command, context: SyncHandlerContext) -> None:
        write(context)

    with working(bus, registry_of(transactional=True, Debit=debit)):
        settled(bus, bus.send(DOMAIN, "Debit", {}))
        eventually(lambda: len(handler_sessions(db)) == 1, what="a session of the handler's")
    eventually(lambda: not handler_sessions(db), what="the end of the session")


def test_it_may_send_in_its_transaction_and_outside(bus: SyncCommandBus) -> None:
    def debit(command: Command, context: SyncHandlerContext) -> None:
        context.bus.send(DOMAIN, "Inside", {}, connection=context.connection)
        context.bus.send(DOMAIN, "Outside", {})
        assert context.bus.count(command_type="Inside") == 0
        if context.attempt == 1:
            raise LookupError("and once more")

    with working(bus, registry_of(transactional=True, Debit=debit)):
        assert settled(bus, bus.send(DOMAIN, "Debit", {})).attempts == 2
    assert bus.count(command_type="Inside") == 1
    assert bus.count(command_type="Outside") == 2
