"""The blocking processes."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from dataclasses import replace
from functools import partial
from typing import Any, Concatenate, ParamSpec, TypeVar
from uuid import UUID

from commandbus._connections import run_on
from commandbus.model import Page
from commandbus.process import Process
from commandbus.process_model import ProcessReceipt, ProcessRecord, ProcessStatus, ProcessStep
from commandbus.processes import Processes, beginning
from commandbus.sync.bus import SyncCommandBus
from commandbus.sync.call import Call

P = ParamSpec("P")
S = TypeVar("S")
T = TypeVar("T")


class SyncProcesses:
    """The same as `Processes`, for code without an event loop."""

    def __init__(self, bus: SyncCommandBus) -> None:
        self._bus = bus

    def _call(
        self, function: Callable[Concatenate[Processes, P], Coroutine[Any, Any, T]], *args: P.args, **more: P.kwargs
    ) -> T:
        self._bus.runtime.check(function.__qualname__)
        done: T = self._bus.runtime.join(Call(partial(function, Processes(self._bus.opened()), *args, **more)))
        return done

    def start_process(
        self, process: type[Process[S]], state: S, *, process_id: UUID | None = None, connection: object = None
    ) -> ProcessReceipt:
        """Start a process, and send its first steps; see `Processes.start_process`.

        With `connection`, a blocking one, it is started in this thread, without the event loop, in your transaction.
        """
        if connection is None:
            return self._call(Processes.start_process, process, state, process_id=process_id)
        self._bus.runtime.check("Processes.start_process")
        _, work = beginning(self._bus._local(), process, state, process_id)
        return run_on(connection, replace(work, wake=self._bus._wake_soon))

    def get_process(self, domain: str, process_id: UUID) -> ProcessRecord:
        """Return a process. Raises `CommandNotFoundError`."""
        return self._call(Processes.get_process, domain, process_id)

    def query_processes(
        self,
        *,
        domain: str | None = None,
        status: ProcessStatus | None = None,
        process_type: str | None = None,
        limit: int = 100,
        cursor: str | None = None,
    ) -> Page[ProcessRecord]:
        """Return a page of processes, newest first within a domain; see `Processes.query_processes`."""
        return self._call(
            Processes.query_processes,
            domain=domain,
            status=status,
            process_type=process_type,
            limit=limit,
            cursor=cursor,
        )

    def get_timeline(self, domain: str, process_id: UUID) -> list[ProcessStep]:
        """Return all commands that a process has sent, in order. Raises `CommandNotFoundError`."""
        return self._call(Processes.get_timeline, domain, process_id)

    def retry_process(self, domain: str, process_id: UUID, *, operator: str, reason: str | None = None) -> int:
        """Put back what holds a process up; see `Processes.retry_process`."""
        return self._call(Processes.retry_process, domain, process_id, operator=operator, reason=reason)

    def cancel_process(self, domain: str, process_id: UUID, *, operator: str, reason: str) -> None:
        """Compensate a process; see `Processes.cancel_process`."""
        self._call(Processes.cancel_process, domain, process_id, operator=operator, reason=reason)

    def resume_process(
        self, domain: str, process_id: UUID, *, operator: str, reason: str | None = None
    ) -> tuple[str, ...]:
        """End the waits of a process now; returns their names."""
        return self._call(Processes.resume_process, domain, process_id, operator=operator, reason=reason)
