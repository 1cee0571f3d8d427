"""Forks of a process that uses the library: the child begins anew, and the parent does not notice."""

from __future__ import annotations

import psycopg
import pytest

from tests.bus.support import ids, rows
from tests.sync.support_programs import run_program


@pytest.fixture
def origins(db: psycopg.Connection) -> None:
    """Let each command leave a note of the server's process and the client's."""
    db.execute("CREATE TABLE public.origin (backend int, client int)")
    db.execute(
        "CREATE FUNCTION public.note_origin() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
        "INSERT INTO public.origin VALUES (pg_backend_pid(), (NEW.data ->> 'pid')::int); RETURN NEW; END $$"
    )
    db.execute(
        "CREATE TRIGGER origin BEFORE INSERT ON commandbus.command FOR EACH ROW EXECUTE FUNCTION public.note_origin()"
    )


@pytest.mark.usefixtures("origins")
@pytest.mark.parametrize(
    ("name", "clients"),
    [
        ("storm", 41),
        ("storm_on_uvloop", 9),
        ("make_ids", 0),
        ("fork_while_it_opens", 2),
        ("grandchildren", 3),
        ("worker_before_the_fork", 2),
        ("terminate_the_child_of_a_worker", 1),
        ("foreign_loop", 1),
        ("multiprocessing_with_fork", 4),
        ("multiprocessing_with_spawn", 4),
    ],
)
def test_parent_and_children_send_on_connections_of_their_own(
    name: str, clients: int, dsn: str, db: psycopg.Connection
) -> None:
    code, known, said = run_program("forks.py", name, dsn)
    assert (code, said) == (0, "")
    assert sorted(ids(db)) == sorted(known)
    found = set(rows(db, "SELECT backend, client FROM public.origin"))
    assert len({client for _, client in found}) == clients
    shared = [backend for backend, _ in found if sum(one == backend for one, _ in found) > 1]
    assert shared == []
