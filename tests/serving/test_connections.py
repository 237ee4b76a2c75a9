"""Connections are bounded: one that waits for its client gives way, one that was accepted never does."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from starlette.requests import ClientDisconnect

from fedtune.serving.connections import BoundedConnection, Connections

ASK = b"POST /predict HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\n\r\nbody"
PROBE = b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n"


class Client:
    """One connection to the server."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def say(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def answer(self) -> tuple[int, dict[str, str], bytes]:
        """(status, headers, body); status 0: the connection was closed"""
        try:
            head = await asyncio.wait_for(self.reader.readuntil(b"\r\n\r\n"), 60)
        except (asyncio.IncompleteReadError, ConnectionError):
            return 0, {}, b""
        first, *lines = head.decode().split("\r\n")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines if line)}
        return int(first.split()[1]), headers, await self.reader.readexactly(int(headers["content-length"]))


class Crowd:
    """A server with `most` connections, whose /predict answers when `go` is set, with `size` bytes."""

    def __init__(self, most: int, size: int = 1) -> None:
        self.app, self.go, self.asked, self.noted = FastAPI(), asyncio.Event(), 0, list[str]()
        self.room = self.app.state.connections = Connections(most)
        self.room.noted = self.noted.append

        @self.app.post("/predict")
        async def predict(request: Request) -> str:
            with contextlib.suppress(ClientDisconnect):
                await request.body()
            self.asked += 1
            await self.go.wait()
            return "a" * size

        @self.app.get("/healthz")
        async def healthz() -> dict[str, str]:
            return {}

    @contextlib.asynccontextmanager
    async def open(self) -> AsyncIterator[None]:
        config = uvicorn.Config(self.app, http=BoundedConnection, log_config=None, lifespan="off")
        server = uvicorn.Server(config)
        self.listener = socket.create_server(("127.0.0.1", 0))
        serving = asyncio.create_task(server.serve([self.listener]))
        while not server.started:
            await asyncio.sleep(0.01)
        try:
            yield
        finally:
            self.go.set()
            server.should_exit = server.force_exit = True
            await serving

    async def client(self, *said: bytes) -> Client:
        client, before = Client(*await asyncio.open_connection(*self.listener.getsockname())), self.asked
        for one in said:
            await client.say(one)
        async with asyncio.timeout(60):
            while ASK in said and self.asked == before:
                await asyncio.sleep(0.005)
        return client


def test_the_one_that_waits_longest_for_its_client_gives_way() -> None:
    async def main() -> None:
        crowd = Crowd(most=3)
        async with crowd.open():
            accepted = await crowd.client(ASK)
            silent = await crowd.client()
            half = await crowd.client(ASK[:-2])
            new = await crowd.client(ASK)
            assert (await silent.answer())[0] == 0 and crowd.noted == ["closed"]
            newer = await crowd.client(ASK)
            assert (await half.answer())[0] == 0 and crowd.noted == ["closed", "closed"]
            crowd.go.set()
            assert [(await one.answer())[0] for one in (accepted, new, newer)] == [200, 200, 200]
            # They are idle now, in this order; the first asks again, and is not the next to go.
            await accepted.say(ASK)
            assert (await accepted.answer())[0] == 200
            newest = await crowd.client(ASK)
            assert (await new.answer())[0] == 0
            await newer.say(PROBE)
            assert (await newer.answer())[0] == 200
            assert len(crowd.room) == 3 and (await newest.answer())[0] == 200

    asyncio.run(main())


def test_what_was_accepted_is_never_closed_and_probes_are_heard_when_all_was() -> None:
    async def main() -> None:
        crowd = Crowd(most=2)
        async with crowd.open():
            accepted = [await crowd.client(ASK) for _ in range(2)]
            probe = await crowd.client(PROBE)
            assert (await probe.answer())[0] == 200  # uvicorn's limit_concurrency says 503 here
            refused = await crowd.client()
            assert (await probe.answer())[0] == 0  # it was idle
            await refused.say(ASK)
            status, headers, body = await refused.answer()
            assert (status, headers["retry-after"], headers["connection"]) == (503, "1", "close")
            assert json.loads(body)["detail"] and (await refused.answer())[0] == 0
            assert crowd.noted == ["closed", "refused"]
            crowd.go.set()
            assert [(await one.answer())[0] for one in accepted] == [200, 200]
            later = await crowd.client(ASK)
            assert (await later.answer())[0] == 200

    asyncio.run(main())


def test_who_does_not_take_its_answer_gives_way() -> None:
    async def main() -> None:
        crowd = Crowd(most=2, size=30_000_000)
        async with crowd.open():
            lazy = await crowd.client(ASK)
            lazy.writer.transport.pause_reading()  # type: ignore[attr-defined]
            crowd.go.set()
            while not crowd.room._waiting:
                await asyncio.sleep(0.01)
            other = await crowd.client(PROBE)
            assert (await other.answer())[0] == 200
            crowd.go.clear()
            await other.say(ASK)
            while crowd.asked < 2:
                await asyncio.sleep(0.01)
            third = await crowd.client(ASK)
            assert crowd.noted == ["closed"] and crowd.asked == 3
            crowd.go.set()
            assert (await third.answer())[0] == 200

    asyncio.run(main())


def test_headers_without_an_end_are_not_kept() -> None:
    async def main() -> None:
        crowd = Crowd(most=2)
        crowd.go.set()
        async with crowd.open():
            long = await crowd.client(PROBE[:-2] + b"A: " + b"a" * 40_000 + b"\r\n\r\n")
            assert (await long.answer())[0] == 200
            endless = await crowd.client(PROBE[:-2] + b"A: ")
            with contextlib.suppress(ConnectionError):
                for _ in range(8):
                    await endless.say(b"a" * 40_000)
                    await asyncio.sleep(0.01)
            assert (await endless.answer())[0] == 0 and len(crowd.room) == 1

    asyncio.run(main())


def test_idle_connections_by_the_thousand_keep_nobody_out() -> None:
    async def main() -> None:
        crowd: Any = Crowd(most=50)
        crowd.go.set()
        async with crowd.open():
            idle = [await crowd.client() for _ in range(200)]
            one = await crowd.client(ASK)
            assert (await one.answer())[0] == 200
            assert len(crowd.room) == 50 and crowd.noted == ["closed"] * 151
            assert (await idle[0].answer())[0] == 0

    asyncio.run(main())
