"""A TCP proxy in front of a PostgreSQL, which can be slow, silent, or gone."""

from __future__ import annotations

import asyncio
import contextlib
import random
import threading
from collections.abc import Callable
from typing import Any, Self, TypeVar

from psycopg.conninfo import conninfo_to_dict, make_conninfo

T = TypeVar("T")


class Link:
    """A client's connection, and the one to the server that was made for it."""

    def __init__(self, client: asyncio.StreamWriter, server: asyncio.StreamWriter) -> None:
        self.client = client
        self.server = server

    def cut(self) -> None:
        """Break both at once, with what is under way in them."""
        self.client.transport.abort()
        self.server.transport.abort()


class Proxy:
    """Runs in a thread of its own, inside `with`. Its methods may be called from any thread.

    `dsn` leads to the server, by a Unix socket or by TCP.
    """

    def __init__(self, dsn: str) -> None:
        self._dsn = dsn
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)
        self._server: asyncio.Server
        self._links: set[Link] = set()
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._delay: Callable[[], float] | None = None

    def dsn(self, dsn: str | None = None) -> str:
        """The same database, by way of this proxy."""
        port = self._server.sockets[0].getsockname()[1]
        return make_conninfo(dsn or self._dsn, host="127.0.0.1", port=port, sslmode="disable", gssencmode="disable")

    def freeze(self) -> None:
        """Pass nothing on from now, either way; connections stay open, and new ones are taken and not answered."""
        self._call(self._flowing.clear)

    def thaw(self) -> None:
        """Let everything go on where it stood still."""
        self._call(self._flowing.set)

    def slow(self, seconds: float, chance: random.Random | None = None) -> None:
        """Hold whatever passes, each way, for so long; with `chance` for up to twice as long. 0: no longer."""
        draw: Callable[[], float] = (lambda: chance.uniform(0, 2 * seconds)) if chance else lambda: seconds
        self._delay = draw if seconds else None

    def cut(self, share: float = 1.0, chance: random.Random | None = None) -> int:
        """Break this share of the connections, drawn by `chance`; returns how many."""

        def cut() -> int:
            links = sorted(self._links, key=id)
            drawn = links if chance is None else chance.sample(links, round(share * len(links)))
            for link in drawn:
                link.cut()
            return len(drawn)

        return self._call(cut)

    async def passing(self, link: Link, *, to_server: bool, data: bytes) -> bytes:
        """What is passed on of what has come. Runs on the proxy's loop; may wait, and may cut the link."""
        await self._flowing.wait()
        if self._delay:
            await asyncio.sleep(self._delay())
        return data

    def __enter__(self) -> Self:
        self._thread.start()
        self._server = self._await(asyncio.start_server(self._serve, "127.0.0.1", 0))
        return self

    def __exit__(self, *error: object) -> None:
        self._await(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _close(self) -> None:
        self._server.close()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _serve(self, client_reader: asyncio.StreamReader, client: asyncio.StreamWriter) -> None:
        try:
            server_reader, server = await self._connect()
        except OSError:
            client.transport.abort()
            return
        link = Link(client, server)
        self._links.add(link)
        pumps = (
            self._pump(link, client_reader, server, to_server=True),
            self._pump(link, server_reader, client, to_server=False),
        )
        try:
            with contextlib.suppress(asyncio.CancelledError):  # as it closes; asyncio would say so on stderr
                await asyncio.gather(*pumps)
        finally:
            self._links.discard(link)
            link.cut()

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        where = conninfo_to_dict(self._dsn)
        host, port = str(where["host"]), int(where["port"] or 5432)
        if host.startswith("/"):
            return await asyncio.open_unix_connection(f"{host}/.s.PGSQL.{port}")
        return await asyncio.open_connection(host, port)

    async def _pump(
        self, link: Link, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, to_server: bool
    ) -> None:
        try:
            while data := await reader.read(65536):
                writer.write(await self.passing(link, to_server=to_server, data=data))
                await writer.drain()
            if writer.can_write_eof():
                writer.write_eof()
        except OSError:  # one side was reset: so is the other, which might wait for an answer for ever
            link.cut()

    def _call(self, function: Callable[[], T]) -> T:
        """Run a function on the proxy's loop."""

        async def call() -> T:
            return function()

        return self._await(call())  # type: ignore[no-any-return]

    def _await(self, coroutine: Any) -> Any:  # noqa: ANN401 - whatever it returns
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()
