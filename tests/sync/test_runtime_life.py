"""The runtime alone: which loop it has, whose that is, and its shutdown. No database."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import uvloop

from commandbus.errors import ClosedError, ConfigurationError, SyncInAsyncError
from commandbus.sync import SyncCommandBus, SyncRuntime, configure, defaults
from tests.support import eventually
from tests.sync.support_runtime import Slow, add, in_thread

# ------------------------------------------------------------------------------- loops, shared and of one's own


async def kind_of_loop() -> str:
    return type(asyncio.get_running_loop()).__module__.partition(".")[0]


def test_the_loop_is_made_by_the_factory() -> None:
    with SyncRuntime(loop_factory=uvloop.new_event_loop) as runtime:
        assert runtime.run(kind_of_loop) == "uvloop"
        with pytest.raises(TimeoutError):
            runtime.run(Slow(), timeout=0.01)


def test_by_default_it_is_a_selector_loop(runtime: SyncRuntime) -> None:
    assert isinstance(runtime.start(), asyncio.SelectorEventLoop)


def test_a_factory_that_fails_may_be_asked_again() -> None:
    tries: list[Callable[[], asyncio.AbstractEventLoop]] = [asyncio.SelectorEventLoop]

    def factory() -> asyncio.AbstractEventLoop:
        if len(tries) == 1:
            tries.append(tries[0])
            raise OSError("too many open files")
        return tries[0]()

    with SyncRuntime(loop_factory=factory) as runtime:
        with pytest.raises(OSError, match="too many"):
            runtime.run(add, 1, 2)
        assert runtime.run(add, 1, 2) == 3


@pytest.fixture
def own_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the test configure, and forget it."""
    monkeypatch.setattr(defaults, "_runtimes", {})
    monkeypatch.setattr(defaults, "_sizes", {})


@pytest.mark.usefixtures("own_defaults")
def test_buses_share_the_runtime_of_the_process() -> None:
    one, other = SyncCommandBus("dbname=x"), SyncCommandBus("dbname=y")
    assert one.runtime is other.runtime


@pytest.mark.usefixtures("own_defaults")
def test_the_runtime_of_the_process_can_be_given(runtime: SyncRuntime) -> None:
    configure(runtime=runtime, thread_pool_size=3)
    configure()  # leaves both as they are
    assert SyncCommandBus("dbname=x").runtime is runtime
    assert defaults.default_pool_size() == 3
    with pytest.raises(ConfigurationError, match="thread_pool_size is 0"):
        configure(thread_pool_size=0)


@pytest.mark.usefixtures("own_defaults")
def test_one_that_was_shut_down_is_replaced(runtime: SyncRuntime) -> None:
    configure(runtime=runtime)
    runtime.shutdown()
    assert SyncCommandBus("dbname=x").runtime is not runtime


# ------------------------------------------------------------------------------------- a loop of somebody else's


@pytest.fixture
def foreign() -> Iterator[asyncio.AbstractEventLoop]:
    """A loop that runs in another thread."""
    loop = asyncio.new_event_loop()
    with in_thread(loop.run_forever):
        yield loop
        loop.call_soon_threadsafe(loop.stop)
    loop.close()


def test_it_runs_calls_on_a_loop_that_runs_elsewhere(foreign: asyncio.AbstractEventLoop) -> None:
    async def where() -> asyncio.AbstractEventLoop:
        return asyncio.get_running_loop()

    assert SyncRuntime.of(foreign).run(where) is foreign


def test_shutdown_leaves_such_a_loop_alone_and_ends_the_runtime(foreign: asyncio.AbstractEventLoop) -> None:
    runtime, slow = SyncRuntime.of(foreign), Slow()
    neighbour = asyncio.run_coroutine_threadsafe(slow(), foreign)
    runtime.shutdown()
    with pytest.raises(ClosedError):
        runtime.run(add, 1, 2)
    foreign.call_soon_threadsafe(slow.go_on.set)
    assert neighbour.result(10) == "went on"


def test_a_call_on_such_a_loop_from_itself_would_wait_for_itself(foreign: asyncio.AbstractEventLoop) -> None:
    runtime = SyncRuntime.of(foreign)

    async def call() -> None:
        runtime.run(add, 1, 2)

    with pytest.raises(SyncInAsyncError, match="`await add`"):
        runtime.run(call)


# ------------------------------------------------------------------------------------------------------ shutdown


def test_after_it_calls_are_refused(runtime: SyncRuntime) -> None:
    assert runtime.run(add, 1, 2) == 3
    runtime.shutdown()
    runtime.shutdown()
    with pytest.raises(ClosedError, match="was shut down"):
        runtime.run(add, 1, 2)
    with pytest.raises(ClosedError, match="was shut down"):
        runtime.run(add(1, 2))


def test_one_that_never_started_is_shut_down_too() -> None:
    runtime = SyncRuntime()
    runtime.shutdown()
    with pytest.raises(ClosedError):
        runtime.run(add, 1, 2)


def test_a_call_that_waits_is_cancelled_and_refused(runtime: SyncRuntime) -> None:
    slow = Slow()
    with in_thread(lambda: runtime.run(slow)) as ends:
        eventually(slow.has_begun)
        runtime.shutdown()
    assert [type(end) for end in ends] == [ClosedError]
    assert slow.story == ["began", "was cancelled"]


def test_a_call_that_cannot_be_cancelled_is_refused_all_the_same(
    runtime: SyncRuntime, caplog: pytest.LogCaptureFixture
) -> None:
    begun = threading.Event()

    async def stubborn() -> None:
        begun.set()
        while True:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                continue

    with in_thread(lambda: runtime.run(stubborn)) as ends:
        assert begun.wait(10)
        runtime.shutdown()
    assert [type(end) for end in ends] == [ClosedError]
    ends.clear()
    gc.collect()
    caplog.clear()  # "Task was destroyed": asyncio is right


def test_calls_that_come_while_it_ends_are_refused_or_answered(runtime: SyncRuntime) -> None:
    answers = 0

    def hammer() -> None:
        nonlocal answers
        while True:
            assert runtime.run(add(1, 2)) == 3
            answers += 1

    with in_thread(hammer) as one, in_thread(hammer) as two, in_thread(hammer) as three:
        eventually(lambda: answers > 100)
        runtime.shutdown()
    assert [type(end) for end in (*one, *two, *three)] == [ClosedError] * 3


def test_several_threads_may_shut_it_down_at_once(runtime: SyncRuntime) -> None:
    closed = []

    async def close(seconds: float) -> None:
        await asyncio.sleep(0.05)
        closed.append(seconds)

    runtime.start()
    runtime.adopt(close)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: runtime.shutdown(), range(8)))
    assert len(closed) == 1


def test_what_fails_to_close_does_not_keep_the_rest_open(
    runtime: SyncRuntime, caplog: pytest.LogCaptureFixture
) -> None:
    closed = []

    async def close(seconds: float) -> None:
        closed.append(seconds)

    async def break_down(seconds: float) -> None:
        raise OSError("gone")

    runtime.start()
    runtime.adopt(close)
    runtime.adopt(break_down)
    runtime.shutdown()
    assert len(closed) == 1
    assert "something could not be closed" in caplog.text


@pytest.mark.parametrize("when", ["shutdown", "exit of the block"])
def test_it_cannot_be_shut_down_from_its_own_loop(runtime: SyncRuntime, when: str) -> None:
    async def end() -> None:
        if when == "shutdown":
            runtime.shutdown()
        with runtime:
            pass

    with pytest.raises(SyncInAsyncError, match="own loop"):
        runtime.run(end)
    assert runtime.run(add, 1, 2) == 3
