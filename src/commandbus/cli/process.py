"""The subcommands for process managers: list, show, timeline, retry, cancel, resume."""

from __future__ import annotations

from typing import Annotated, TypeAlias
from uuid import UUID

import typer

from commandbus.cli import terminal
from commandbus.cli.database import ask
from commandbus.cli.desk import OfDomain
from commandbus.cli.options import Acting, AsJson, Cursor, Domain, Dsn, Limit, OptionalReason, Reason, spread
from commandbus.process_model import ProcessRecord, ProcessStatus, ProcessStep
from commandbus.processes import Processes

Id: TypeAlias = Annotated[UUID, typer.Argument(metavar="ID")]


def list_processes(
    *,
    domain: OfDomain = None,
    status: Annotated[ProcessStatus | None, typer.Option(case_sensitive=False, help="Only this status.")] = None,
    process_type: Annotated[str | None, typer.Option("--type", help="Only this type.")] = None,
    limit: Limit = 100,
    cursor: Cursor = None,
    dsn: Dsn = None,
    as_json: AsJson = False,
) -> None:
    """List processes, ended ones too, newest first within a domain."""
    page = ask(
        dsn,
        lambda bus: Processes(bus).query_processes(
            domain=domain, status=status, process_type=process_type, limit=limit, cursor=cursor
        ),
    )
    terminal.print_page(page, _process_lines, "no such processes", as_json=as_json)


def _process_lines(process: ProcessRecord) -> tuple[list[object], list[object]]:
    waits = terminal.named("waits_for", ",".join(process.open) or None)
    parked = terminal.named("parked", process.parked or None)
    head = [process.started_at, process.domain, process.process_id, process.process_type, process.status, waits, parked]
    return head, [process.error]


def show(domain: Domain, process_id: Id, *, dsn: Dsn = None, as_json: AsJson = False) -> None:
    """Show a process: its state, what it waits for, and how it ended."""
    process = ask(dsn, lambda bus: Processes(bus).get_process(domain, process_id))
    if as_json:
        terminal.print_json(process)
        return
    texts = {name: terminal.json_cell(getattr(process, name)) for name in ("state", "result")}
    terminal.print_record(terminal.fields(process) | texts | {"open": ", ".join(process.open) or None})


def timeline(domain: Domain, process_id: Id, *, dsn: Dsn = None, as_json: AsJson = False) -> None:
    """Show all commands that a process has sent, in order, and how each ended."""
    steps = ask(dsn, lambda bus: Processes(bus).get_timeline(domain, process_id))
    terminal.print_json(steps) if as_json else terminal.print_entries("timeline", map(_step_lines, steps))


def _step_lines(step: ProcessStep) -> tuple[list[object], list[object]]:
    status = step.command_status if step.status == "OPEN" else step.status
    named = (terminal.named(name, getattr(step, name)) for name in ("due_at", "parked_at", "ended_at"))
    head: list[object] = [
        step.number,
        step.sent_at,
        step.kind,
        step.name,
        status,
        *named,
        step.command_domain,
        step.command_id,
    ]
    return head, [step.error, terminal.json_cell(step.result)]


@spread
def retry(domain: Domain, process_id: Id, *, reason: OptionalReason = None, how: Acting) -> None:
    """Put the parked steps and replies of a process back in line."""
    count = ask(
        how.dsn, lambda bus: Processes(bus).retry_process(domain, process_id, operator=how.operator, reason=reason)
    )
    how.tell({"done": count}, f"retried {count:,} of {process_id}")


@spread
def cancel(domain: Domain, process_id: Id, *, reason: Reason, how: Acting) -> None:
    """Undo what a process has done, and end it."""
    ask(how.dsn, lambda bus: Processes(bus).cancel_process(domain, process_id, operator=how.operator, reason=reason))
    how.tell({"done": None}, f"canceled {process_id}: what it has done is being undone")


@spread
def resume(domain: Domain, process_id: Id, *, reason: OptionalReason = None, how: Acting) -> None:
    """End the waits of a process now."""
    names = ask(
        how.dsn, lambda bus: Processes(bus).resume_process(domain, process_id, operator=how.operator, reason=reason)
    )
    how.tell({"done": names}, f"resumed {process_id}: {', '.join(names)}")
