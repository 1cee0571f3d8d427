"""The subcommands for process managers: list, show, timeline, retry, cancel, resume."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Annotated, TypeAlias
from uuid import UUID

import typer

from commandbus.cli import terminal
from commandbus.cli.database import ask
from commandbus.cli.desk import OfDomain
from commandbus.cli.options import AsJson, Domain, Dsn, Operator, OptionalReason, Reason
from commandbus.process_model import ProcessRecord, ProcessStatus, ProcessStep
from commandbus.processes import Processes

Id: TypeAlias = Annotated[UUID, typer.Argument(metavar="ID")]


def list_processes(
    *,
    domain: OfDomain = None,
    status: Annotated[ProcessStatus | None, typer.Option(case_sensitive=False, help="Only this status.")] = None,
    process_type: Annotated[str | None, typer.Option("--type", help="Only this type.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=1000)] = 100,
    cursor: Annotated[str | None, typer.Option(help="The `next_cursor` of the page before.")] = None,
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
    if as_json:
        terminal.print_json(page)
        return
    for process in page:
        terminal.print_entry(*_process_lines(process))
    if page.next_cursor:
        terminal.say(f"there are more: --cursor {page.next_cursor}")
    elif not page.items:
        terminal.say("no such processes")


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


def retry(
    domain: Domain,
    process_id: Id,
    *,
    operator: Operator,
    reason: OptionalReason = None,
    dsn: Dsn = None,
    as_json: AsJson = False,
) -> None:
    """Put the parked steps and replies of a process back in line."""
    _act(
        lambda processes: processes.retry_process(domain, process_id, operator=operator, reason=reason),
        lambda count: f"retried {count:,} of {process_id}",
        dsn,
        as_json=as_json,
    )


def cancel(
    domain: Domain,
    process_id: Id,
    *,
    operator: Operator,
    reason: Reason,
    dsn: Dsn = None,
    as_json: AsJson = False,
) -> None:
    """Undo what a process has done, and end it."""
    _act(
        lambda processes: processes.cancel_process(domain, process_id, operator=operator, reason=reason),
        lambda _: f"canceled {process_id}: what it has done is being undone",
        dsn,
        as_json=as_json,
    )


def resume(
    domain: Domain,
    process_id: Id,
    *,
    operator: Operator,
    reason: OptionalReason = None,
    dsn: Dsn = None,
    as_json: AsJson = False,
) -> None:
    """End the waits of a process now."""
    _act(
        lambda processes: processes.resume_process(domain, process_id, operator=operator, reason=reason),
        lambda names: f"resumed {process_id}: {', '.join(names)}",
        dsn,
        as_json=as_json,
    )


def _act(
    verb: Callable[[Processes], Awaitable[object]], told: Callable[..., str], dsn: str | None, *, as_json: bool
) -> None:
    answer = ask(dsn, lambda bus: verb(Processes(bus)))
    terminal.print_json({"done": answer}) if as_json else terminal.say(told(answer))
