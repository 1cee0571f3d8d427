"""The blocking troubleshooting queue."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine
from datetime import timedelta
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any, Concatenate, ParamSpec, TypeAlias, TypeVar
from uuid import UUID

from commandbus.model import (
    BulkPreview,
    BulkResult,
    Command,
    Json,
    Page,
    TroubleshootingFilter,
)
from commandbus.sync.bus import SyncCommandBus
from commandbus.sync.call import Call
from commandbus.troubleshooting import TroubleshootingQueue

P = ParamSpec("P")
T = TypeVar("T")
OnProgress: TypeAlias = Callable[[BulkResult], bool | None]
_LOOK_SECONDS = 1.0


class SyncTroubleshootingQueue:
    """The same view and the same actions as `TroubleshootingQueue`, for code without an event loop.

    `on_progress` is called in the calling thread. An exception that it raises, as well as Ctrl-C, stops the action
    after the batch under way, and has a note that says how many are done.
    """

    def __init__(self, bus: SyncCommandBus) -> None:
        self._bus = bus

    def _call(
        self,
        function: Callable[Concatenate[TroubleshootingQueue, P], Coroutine[Any, Any, T]],
        *args: P.args,
        **more: P.kwargs,
    ) -> T:
        self._bus.runtime.check(function.__qualname__)
        queue = TroubleshootingQueue(self._bus.opened())
        done: T = self._bus.runtime.join(Call(partial(function, queue, *args, **more)))
        return done

    def _act(
        self, function: Callable[..., Coroutine[Any, Any, BulkResult]], on_progress: OnProgress | None, **more: object
    ) -> BulkResult:
        """Run an action over a filter; what it tells of its progress is passed on in this thread."""
        self._bus.runtime.check(function.__qualname__)
        action = partial(function, TroubleshootingQueue(self._bus.opened()), **more)
        if on_progress is not None:
            return _Relay(self._bus, on_progress).run(action)
        done: BulkResult = self._bus.runtime.join(Call(action))
        return done

    # -- looking -------------------------------------------------------------------------------------------------------

    def list_troubleshooting(
        self,
        domain: str,
        *,
        command_type: str | None = None,
        error_code: str | None = None,
        fingerprint: str | None = None,
        parked_for: timedelta | None = None,
        text: str | None = None,
        limit: int = 100,
        cursor: str | None = None,
    ) -> Page[Command]:
        """Return a page of parked commands; see `TroubleshootingQueue.list_troubleshooting`."""
        return self._call(
            TroubleshootingQueue.list_troubleshooting,
            domain,
            command_type=command_type,
            error_code=error_code,
            fingerprint=fingerprint,
            parked_for=parked_for,
            text=text,
            limit=limit,
            cursor=cursor,
        )

    def count_troubleshooting(self, domain: str | None = None, *, command_type: str | None = None) -> int:
        """Count the parked commands, of one domain or of all."""
        return self._call(TroubleshootingQueue.count_troubleshooting, domain, command_type=command_type)

    def preview(self, which: TroubleshootingFilter) -> BulkPreview:
        """Tell what an action over this filter would act on, and change nothing."""
        return self._call(TroubleshootingQueue.preview, which)

    # -- acting on one -------------------------------------------------------------------------------------------------

    def operator_retry(
        self, domain: str, command_id: UUID, *, data: Json = None, operator: str, reason: str | None = None
    ) -> None:
        """Put it back: `IN_TROUBLESHOOTING_QUEUE -> PENDING`; see `TroubleshootingQueue.operator_retry`."""
        self._call(TroubleshootingQueue.operator_retry, domain, command_id, data=data, operator=operator, reason=reason)

    def operator_cancel(self, domain: str, command_id: UUID, *, operator: str, reason: str) -> None:
        """Give it up: `IN_TROUBLESHOOTING_QUEUE -> CANCELED`."""
        self._call(TroubleshootingQueue.operator_cancel, domain, command_id, operator=operator, reason=reason)

    def operator_complete(
        self, domain: str, command_id: UUID, *, result_data: Json = None, operator: str, reason: str
    ) -> None:
        """Note that the work was done by hand: `IN_TROUBLESHOOTING_QUEUE -> COMPLETED`, with this result."""
        self._call(
            TroubleshootingQueue.operator_complete,
            domain,
            command_id,
            result_data=result_data,
            operator=operator,
            reason=reason,
        )

    # -- acting on many ------------------------------------------------------------------------------------------------

    def operator_retry_many(
        self,
        which: TroubleshootingFilter,
        *,
        expected_count: int,
        patch: Json = None,
        operator: str,
        reason: str | None = None,
        per_second: float | None = None,
        on_progress: OnProgress | None = None,
    ) -> BulkResult:
        """Put them back: `IN_TROUBLESHOOTING_QUEUE -> PENDING`; see `TroubleshootingQueue.operator_retry_many`."""
        return self._act(
            TroubleshootingQueue.operator_retry_many,
            on_progress,
            which=which,
            expected_count=expected_count,
            patch=patch,
            operator=operator,
            reason=reason,
            per_second=per_second,
        )

    def operator_cancel_many(
        self,
        which: TroubleshootingFilter,
        *,
        expected_count: int,
        operator: str,
        reason: str,
        per_second: float | None = None,
        on_progress: OnProgress | None = None,
    ) -> BulkResult:
        """Give them up: `IN_TROUBLESHOOTING_QUEUE -> CANCELED`."""
        return self._act(
            TroubleshootingQueue.operator_cancel_many,
            on_progress,
            which=which,
            expected_count=expected_count,
            operator=operator,
            reason=reason,
            per_second=per_second,
        )

    def operator_complete_many(
        self,
        which: TroubleshootingFilter,
        *,
        expected_count: int,
        result_data: Json = None,
        operator: str,
        reason: str,
        per_second: float | None = None,
        on_progress: OnProgress | None = None,
    ) -> BulkResult:
        """Note that the work was done by hand: `IN_TROUBLESHOOTING_QUEUE -> COMPLETED`, each with this result."""
        return self._act(
            TroubleshootingQueue.operator_complete_many,
            on_progress,
            which=which,
            expected_count=expected_count,
            result_data=result_data,
            operator=operator,
            reason=reason,
            per_second=per_second,
        )


class _Relay:
    """Carries progress from the loop to the calling thread, and the answer back: the loop runs no code of a user's."""

    def __init__(self, bus: SyncCommandBus, on_progress: OnProgress) -> None:
        self._runtime = bus.runtime
        self._on_progress = on_progress
        self._deaf = False  # the calling thread waits for the end, and answers no more
        self._told: SimpleQueue[tuple[BulkResult, asyncio.Future[bool | None]] | None] = SimpleQueue()

    def run(self, action: Callable[..., Coroutine[Any, Any, BulkResult]]) -> BulkResult:
        call = self._runtime.begin(Call(partial(self._until_the_end, action)))
        try:
            while (told := self._next(call)) is not None:
                progress, answer = told
                self._runtime.submit(partial(_settle, answer, self._on_progress(progress)), answer.set_exception)
        except BaseException as interruption:
            self._deaf = True
            self._runtime.abandon(call)
            call.explain(interruption)
            raise
        result: BulkResult = self._runtime.join(call)
        return result

    def _next(self, call: Call) -> tuple[BulkResult, asyncio.Future[bool | None]] | None:
        while not call.done or not self._told.empty():
            with contextlib.suppress(Empty):  # a call that the runtime has refused tells nothing
                return self._told.get(timeout=_LOOK_SECONDS)
        return None

    async def _until_the_end(self, action: Callable[..., Coroutine[Any, Any, BulkResult]]) -> BulkResult:
        try:
            return await action(on_progress=self._tell)
        finally:
            self._told.put(None)

    async def _tell(self, progress: BulkResult) -> bool | None:
        if self._deaf:
            return None
        answer: asyncio.Future[bool | None] = asyncio.get_running_loop().create_future()
        self._told.put((progress, answer))
        return await answer


def _settle(answer: asyncio.Future[bool | None], verdict: bool | None) -> None:  # noqa: FBT001 - passes on
    if not answer.done():
        answer.set_result(verdict)
