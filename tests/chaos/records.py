"""What is known of a run beside the tables of the bus: tables in the same database, so that SQL can compare."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime

import psycopg

from tests.chaos.faults import Struck
from tests.chaos.journal import Note
from tests.chaos.plan import Plan

Db = psycopg.Connection[tuple[object, ...]]

_NOTE = ("what", "who", "command_id", "number", "delivery", "verb", "outcome")

SCHEMA = """
CREATE SCHEMA chaos;
CREATE TABLE chaos.effect (command_id uuid NOT NULL, delivery bigint NOT NULL);
CREATE TABLE chaos.reply (command_id uuid NOT NULL, status text NOT NULL);
CREATE TABLE chaos.planned (
    number integer PRIMARY KEY, command_id uuid NOT NULL, kind text NOT NULL, way text NOT NULL, group_id uuid);
CREATE TABLE chaos.fault (kind text NOT NULL, began timestamptz NOT NULL, ended timestamptz NOT NULL, pid integer);
CREATE TABLE chaos.note (
    at timestamptz NOT NULL, what text NOT NULL, who text NOT NULL, command_id uuid, number integer, delivery bigint,
    verb text, outcome text);
CREATE INDEX note_command ON chaos.note (command_id);
CREATE TABLE chaos.blame (violation text NOT NULL, detail text NOT NULL);
"""


def make(db: Db) -> None:
    """Make the tables."""
    db.execute(SCHEMA)


def keep_plan(db: Db, plan: Plan) -> None:
    """Keep what was to be sent."""
    with db.cursor().copy("COPY chaos.planned FROM STDIN") as copy:
        for each in plan.commands:
            copy.write_row((each.number, each.command_id, each.kind, each.way, each.group))


def keep_faults(db: Db, faults: Iterable[Struck]) -> None:
    """Keep what has struck."""
    with db.cursor().copy("COPY chaos.fault FROM STDIN") as copy:
        for each in faults:
            copy.write_row((each.kind, _moment(each.began), _moment(each.ended), each.pid))


def keep_notes(db: Db, notes: Iterable[Note]) -> None:
    """Keep what the processes have seen."""
    with db.cursor().copy(f"COPY chaos.note (at, {', '.join(_NOTE)}) FROM STDIN") as copy:
        for note in notes:
            copy.write_row((_moment(note["at"]), *(note.get(name) for name in _NOTE)))


def keep_blame(db: Db, blamed: Iterable[tuple[str, str]]) -> None:
    """Keep what was seen to be wrong as it happened."""
    with db.cursor().copy("COPY chaos.blame FROM STDIN") as copy:
        for row in blamed:
            copy.write_row(row)


def _moment(at: float) -> datetime:
    return datetime.fromtimestamp(at, UTC)
