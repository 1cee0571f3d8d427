"""The runtime alone: calls, how they end, and in which context. No database."""

from __future__ import annotations

import asyncio
import contextvars
import os
import signal
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import partial
from typing import Any

import pytest

from commandbus.sync import SyncRuntime
from tests.support import eventually
from tests.sync.support_runtime import Slow, add, fail, in_thread, on_loop

request: contextvars.ContextVar[str] = contextvars.ContextVar("request", default="none")


# ------------------------------------------------------------------------------------------ results and errors


def test_it_returns_what_the_coroutine_returns(runtime: SyncRuntime) -> None:
    assert runtime.run(add(1, 2)) == 3


def test_it_calls_an_async_function_with_its_arguments(runtime: SyncRuntime) -> None:
    assert runtime.run(add, 1, 2) == 3


def test_all_calls_run_on_one_loop_in_a_daemon_thread(runtime: SyncRuntime) -> None:
    async def where() -> tuple[asyncio.AbstractEventLoop, threading.Thread]:
        return asyncio.get_running_loop(), threading.current_thread()

    loop, thread = runtime.run(where)
    assert runtime.run(where) == (loop, thread)
    assert thread is not threading.current_thread()
    assert thread.daemon


def test_nothing_starts_before_the_first_call() -> None:
    before = threading.active_count()
    with SyncRuntime():
        assert threading.active_count() == before


def test_an_exception_comes_with_its_traceback_and_its_notes(runtime: SyncRuntime) -> None:
    async def noted() -> None:
        try:
            await fail()
        except LookupError as error:
            error.add_note("look again")
            raise

    with pytest.raises(LookupError, match="the third shelf") as caught:
        runtime.run(noted)
    assert caught.value.__notes__ == ["look again"]
    names = [frame.name for frame in traceback.extract_tb(caught.tb)]
    assert names[0] == "test_an_exception_comes_with_its_traceback_and_its_notes"
    assert names[-2:] == ["noted", "fail"]


@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt, GeneratorExit])
def test_what_would_end_a_loop_is_the_callers_too(runtime: SyncRuntime, kind: type[BaseException]) -> None:
    async def leave() -> None:
        raise kind

    with pytest.raises(kind):
        runtime.run(leave)
    assert runtime.run(add, 1, 2) == 3


def test_a_function_that_makes_no_coroutine_raises_in_the_caller(runtime: SyncRuntime) -> None:
    blocking: Any = len
    with pytest.raises(TypeError):
        runtime.run(blocking, "abc")


def test_many_threads_get_each_their_own_result(runtime: SyncRuntime) -> None:
    def call(number: int) -> list[int]:
        return [runtime.run(add, number, other) for other in range(50)]

    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(call, range(16)))
    assert found == [[number + other for other in range(50)] for number in range(16)]


# --------------------------------------------------------------------------------------------------- timeouts


@pytest.mark.parametrize("timeout", [0.05, timedelta(milliseconds=50)])
def test_after_the_timeout_it_is_cancelled_and_its_end_awaited(
    runtime: SyncRuntime, timeout: float | timedelta
) -> None:
    slow = Slow()
    with pytest.raises(TimeoutError, match=r"did not end within 0\.05 s: it was cancelled"):
        runtime.run(slow, timeout=timeout)
    assert slow.story in ([], ["began", "was cancelled"])


def test_what_ends_with_a_result_when_it_is_cancelled_has_ended_in_time(runtime: SyncRuntime) -> None:
    assert runtime.run(Slow(when_cancelled=lambda: "done all the same"), timeout=0.01) == "done all the same"


@pytest.mark.parametrize("of", [Slow, partial(add, 1, 2)], ids=["function", "coroutine"])
def test_what_is_cancelled_before_its_first_step_has_ended_too(runtime: SyncRuntime, of: Callable[[], Any]) -> None:
    held = threading.Event()
    on_loop(runtime, held.wait)  # the call and its cancellation are taken from the queue together
    release = threading.Timer(0.05, held.set)
    release.start()
    with pytest.raises(TimeoutError):
        runtime.run(of(), timeout=0)
    release.join()


def test_its_own_exception_goes_before_the_timeout(runtime: SyncRuntime) -> None:
    async def tidy_up() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            raise LookupError("while tidying up")

    with pytest.raises(LookupError, match="while tidying up"):
        runtime.run(tidy_up, timeout=0.01)


def test_the_notes_of_the_cancelled_call_come_with_the_timeout(runtime: SyncRuntime) -> None:
    async def noted() -> None:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError as error:
            error.add_note("may have been sent")
            raise

    with pytest.raises(TimeoutError) as caught:
        runtime.run(noted, timeout=0.01)
    assert caught.value.__notes__ == ["may have been sent"]


# --------------------------------------------------------------------------------------------------- interrupts


def test_ctrl_c_cancels_the_call_and_comes_when_that_has_ended(runtime: SyncRuntime) -> None:
    slow = Slow()

    def press() -> None:
        eventually(slow.has_begun)
        os.kill(os.getpid(), signal.SIGINT)

    with in_thread(press), pytest.raises(KeyboardInterrupt):
        runtime.run(slow)
    assert slow.story == ["began", "was cancelled"]


def test_an_interrupted_call_leaves_the_runtime_as_it_was(runtime: SyncRuntime) -> None:
    test_ctrl_c_cancels_the_call_and_comes_when_that_has_ended(runtime)
    assert runtime.run(add, 1, 2) == 3


# ----------------------------------------------------------------------------------------------------- contexts


def test_the_coroutine_sees_the_context_of_its_caller(runtime: SyncRuntime) -> None:
    async def look() -> str:
        await asyncio.sleep(0)
        return request.get()

    def call(name: str) -> set[str]:
        request.set(name)
        return {runtime.run(look) for _ in range(50)}

    names = [f"request {number}" for number in range(16)]
    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(call, names)) == [{name} for name in names]


def test_what_it_sets_there_stays_there(runtime: SyncRuntime) -> None:
    async def leave_a_mark() -> str:
        before = request.get()
        request.set("changed")
        return before

    assert [runtime.run(leave_a_mark) for _ in range(2)] == ["none", "none"]
    assert request.get() == "none"
