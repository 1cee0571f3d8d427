"""Many threads on one blocking bus: each caller hears of its own command, under its own trace, and of nothing else."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar
from uuid import UUID

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import Tracer

from commandbus import Command, CommandStatus, HandlerContext, HandlerRegistry, InvalidCommandError, SendRequest
from commandbus.sync import SyncCommandBus, SyncHandlerContext, SyncRuntime, SyncWorker
from commandbus.tracing import OpenTelemetryTracing
from tests.bus.support import DOMAIN, Connection
from tests.support import eventually

T = TypeVar("T")


def in_threads(count: int, function: Callable[[int], T]) -> list[T]:
    """Call the function with 0, 1, ... in a thread each, all at once; return the results in order."""
    with ThreadPoolExecutor(count) as threads:
        return list(threads.map(function, range(count)))


def test_a_poison_batch(bus: SyncCommandBus, db: Connection) -> None:
    """32 threads, 6,400 sends, 100 refused by the database: exactly those callers get an error, their own."""
    db.execute("ALTER TABLE commandbus.command ADD CONSTRAINT antidote CHECK (data ->> 'text' <> 'poison')")
    poison = set(random.sample(range(6400), 100))
    errors: dict[int, InvalidCommandError] = {}
    receipts: dict[int, UUID] = {}

    def sender(thread: int) -> None:
        for n in range(thread, 6400, 32):
            try:
                receipts[n] = bus.send(DOMAIN, "Debit", {"n": n, "text": "poison" if n in poison else ""}).command_id
            except InvalidCommandError as error:
                errors[n] = error

    in_threads(32, sender)
    assert set(errors) == poison
    found = db.execute("SELECT (data ->> 'n')::int, command_id FROM commandbus.command").fetchall()
    assert dict(found) == receipts
    assert len(receipts) == 6300
    named = {UUID(str(error).split()[1]) for error in errors.values()}  # "command <id> was refused ..."
    assert len(named - set(receipts.values())) == 100
    assert len({id(error) for error in errors.values()}) == 100


# -- tracing -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def spans() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def tracer(spans: InMemorySpanExporter) -> Tracer:
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(spans))
    return provider.get_tracer("test")


@pytest.fixture
def traced(runtime: SyncRuntime, dsn: str) -> Iterator[SyncCommandBus]:
    with SyncCommandBus(dsn, runtime=runtime, tracing=OpenTelemetryTracing()) as bus:
        yield bus


def test_sixteen_requests_never_mix(traced: SyncCommandBus, tracer: Tracer, spans: InMemorySpanExporter) -> None:
    """A request sends to a `def` and an `async def` handler, which send on: four spans below its own."""
    registry = HandlerRegistry()

    @registry.handler(DOMAIN, "Def")
    def in_a_thread(command: Command, context: SyncHandlerContext) -> None:
        with tracer.start_as_current_span("Def", attributes={"request": str(command.data)}):
            context.bus.send(DOMAIN, "Next", command.data)

    @registry.handler(DOMAIN, "Async")
    async def on_the_loop(command: Command, context: HandlerContext) -> None:
        with tracer.start_as_current_span("Async", attributes={"request": str(command.data)}):
            await context.bus.send(DOMAIN, "Next", command.data)

    @registry.handler(DOMAIN, "Next")
    def last(command: Command, context: SyncHandlerContext) -> None:
        tracer.start_span("Next", attributes={"request": str(command.data)}).end()

    def request(thread: int) -> None:
        for n in range(5):
            name = f"{thread}.{n}"
            with tracer.start_as_current_span("request", attributes={"request": name}) as span:
                receipt = traced.send(DOMAIN, "Def", name)
                traced.send_batch([SendRequest(DOMAIN, "Async", name)])
                context = span.get_span_context()
            parent = f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"
            assert traced.get_command(receipt).headers == {"traceparent": parent}

    with SyncWorker(traced, DOMAIN, registry, thread_pool_size=8):
        in_threads(16, request)
        eventually(lambda: traced.count(status=CommandStatus.COMPLETED) == 16 * 5 * 4, timeout=30, what="the handlers")

    found = {span.context.span_id: span for span in spans.get_finished_spans() if span.context}
    assert len(found) == 16 * 5 * 5
    parents = {"Def": ["request"], "Async": ["request"], "Next": ["Def", "Async"]}
    for span in found.values():
        if span.name != "request":
            parent_span = _parent(found, span)
            assert parent_span.name in parents[span.name]
            assert _request(parent_span) == _request(span)


def _parent(spans: dict[int, ReadableSpan], span: ReadableSpan) -> ReadableSpan:
    assert span.parent is not None
    return spans[span.parent.span_id]


def _request(span: ReadableSpan) -> object:
    assert span.attributes is not None
    return span.attributes["request"]
