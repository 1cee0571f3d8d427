"""The trace context of each sender goes into the headers of its own command, and nowhere else."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractContextManager
from contextvars import ContextVar
from typing import Any

import psycopg
import pytest
from opentelemetry.sdk.trace import TracerProvider

from commandbus import CommandBus, SendRequest
from commandbus import _send_buffer as send_buffer
from commandbus.tracing import OpenTelemetryTracing
from tests.bus.support import DOMAIN
from tests.support import Route

who: ContextVar[str] = ContextVar("who", default="nobody")


class NamesItsSender:
    """Writes the value of a context variable into the headers."""

    def inject(self, headers: dict[str, str]) -> None:
        headers["who"] = who.get()

    def activate(self, headers: Mapping[str, str]) -> AbstractContextManager[object]:
        return contextlib.nullcontext()


@pytest.fixture
async def traced(route: Route) -> AsyncIterator[CommandBus]:
    async with CommandBus(**route, tracing=NamesItsSender()) as bus:
        yield bus


async def test_sixteen_senders_never_mix(traced: CommandBus) -> None:
    async def sender(name: str) -> None:
        who.set(name)
        for n in range(20):
            await traced.send(DOMAIN, "Debit", name, headers={"n": str(n)})

    await asyncio.gather(*(sender(f"sender {n}") for n in range(16)))
    commands = list(await traced.query_commands(limit=1000))
    assert len(commands) == 320
    for command in commands:
        assert command.headers == {"who": command.data, "n": command.headers["n"]}


async def test_every_way_to_send_is_traced(traced: CommandBus, dsn: str) -> None:
    who.set("ana")
    request = SendRequest(DOMAIN, "Debit", {}, headers={"a": "b"})
    receipts = await traced.send_batch([request, request])
    with psycopg.connect(dsn) as connection:
        receipts.append(await traced.send(DOMAIN, "Debit", {}, headers={"a": "b"}, connection=connection))
    for receipt in receipts:
        assert (await traced.get_command(receipt)).headers == {"who": "ana", "a": "b"}


async def test_a_flush_runs_in_nobodys_context(traced: CommandBus, monkeypatch: pytest.MonkeyPatch) -> None:
    """It carries the commands of many: under the trace of the first, all would seem to be sent by that one."""
    execute = send_buffer.execute  # type: ignore[attr-defined]
    seen: list[str] = []

    async def noting(*args: Any) -> Any:  # noqa: ANN401 - passes on
        seen.append(who.get())
        return await execute(*args)

    monkeypatch.setattr(send_buffer, "execute", noting)
    who.set("ana")
    await asyncio.gather(*(traced.send(DOMAIN, "Debit", n) for n in range(20)))
    assert set(seen) == {"nobody"}


async def test_the_callers_headers_are_not_written_to(traced: CommandBus) -> None:
    headers: dict[str, str] = {}
    await traced.send(DOMAIN, "Debit", {}, headers=headers)
    assert headers == {}


async def test_opentelemetry_writes_the_current_span(route: Route) -> None:
    tracer = TracerProvider(shutdown_on_exit=False).get_tracer("test")
    async with CommandBus(**route, tracing=OpenTelemetryTracing()) as bus:

        async def sender() -> tuple[str, str]:
            with tracer.start_as_current_span("send") as span:
                command = await bus.get_command(await bus.send(DOMAIN, "Debit", {}))
                context = span.get_span_context()
                return command.headers[
                    "traceparent"
                ], f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"

        found = await asyncio.gather(*(sender() for _ in range(16)))
        assert [written for written, _ in found] == [expected for _, expected in found]
        assert len(set(found)) == 16
        outside = await bus.get_command(await bus.send(DOMAIN, "Debit", {}))
        assert outside.headers == {}
