"""A server of the live page in a thread of the test, and a page's socket without a browser."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import uvicorn
from websockets.sync.client import ClientConnection, connect

from sanawm_jax.live import protocol
from sanawm_jax.live.lobby import Lobby
from sanawm_jax.live.security import Guard
from sanawm_jax.live.server import Live, configured


class Running:
    """The server and its address."""

    def __init__(self, lobby: Lobby, port: int, loop: asyncio.AbstractEventLoop):
        self.lobby, self.port, self.loop = lobby, port, loop
        self.address = f"127.0.0.1:{port}"
        self.url = f"http://{self.address}/"

    def session(self) -> Any:
        """The session of the only seat."""
        (seat,) = self.lobby.seats.values()
        return seat.session

    def open(self, session: str = "", **more: Any) -> Page:
        """A page that has said hello."""
        page = Page(connect(f"ws://{self.address}/live", compression=None, **more))
        page.send({"type": "hello", "version": protocol.VERSION, "session": session})
        return page


class Page:
    """What the server sent to a socket."""

    def __init__(self, connection: ClientConnection):
        self.connection = connection
        self.texts: list[dict[str, Any]] = []
        self.pictures: list[tuple[protocol.Picture, float, bytes]] = []

    def send(self, message: Any) -> None:
        self.connection.send(message if isinstance(message, str) else json.dumps(message))

    def hear(self, timeout: float = 10) -> dict[str, Any] | protocol.Picture:
        """The next message."""
        message = self.connection.recv(timeout)
        if isinstance(message, str):
            self.texts.append(json.loads(message))
            return self.texts[-1]
        self.pictures.append(protocol.unpack(message))
        return self.pictures[-1][0]

    def until(self, kind: str, **fields: Any) -> dict[str, Any]:
        """The next text of a type with these fields."""
        end = time.monotonic() + 20
        while time.monotonic() < end:
            message = self.hear()
            if isinstance(message, dict) and message["type"] == kind:
                if all(message[name] == value for name, value in fields.items()):
                    return message
        raise AssertionError(f"no {kind} {fields} came: {self.texts[-3:]}")

    def frame(self) -> tuple[protocol.Picture, float, bytes]:
        """The next picture of the world."""
        while True:
            self.hear()
            if self.pictures and self.pictures[-1][0].kind == protocol.FRAME:
                return self.pictures.pop()
            self.pictures.clear()


@contextlib.contextmanager
def serving(engine: Any, *, seats: int = 1, token: str | None = None) -> Iterator[Running]:
    """Runs the server."""
    lobby = Lobby(engine, seats)
    bound = socket.socket()
    bound.bind(("127.0.0.1", 0))
    server = uvicorn.Server(configured(Guard(Live(lobby, seed=7).app(), token)))
    found: list[Running] = []

    async def run() -> None:
        found.append(Running(lobby, bound.getsockname()[1], asyncio.get_running_loop()))
        lobby.set_stage(None)
        await server.serve(sockets=[bound])

    thread = threading.Thread(target=asyncio.run, args=[run()], daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.005)
    try:
        yield found[0]
    finally:
        server.should_exit = True
        thread.join(15)
        assert not thread.is_alive()
