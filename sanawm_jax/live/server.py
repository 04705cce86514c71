"""The web server: the page, the socket, and files that come and go."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.resources
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState

from sanawm_jax.live import files, protocol
from sanawm_jax.live.lobby import Connection, Lobby
from sanawm_jax.live.pictures import thumbnail
from sanawm_jax.live.session import Session
from sanawm_jax.live.timeline import read_walk, walk_file
from sanawm_jax.runtime.errors import InputError

HELLO = 10.0  # seconds that a socket has for its first message
RATE, BURST = 120.0, 360.0  # messages of one socket: per second, and at once
MAX_SOCKETS = 48
_PAGE = {
    "/": ("index.html", "text/html"),
    "/app.js": ("app.js", "text/javascript"),
    "/view.js": ("view.js", "text/javascript"),
    "/input.js": ("input.js", "text/javascript"),
    "/style.css": ("style.css", "text/css"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}


def configured(app: Any) -> uvicorn.Config:
    """The web server's settings, with its bounds on messages."""
    return uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        server_header=False,
        ws_max_size=2 * protocol.MAX_TEXT,
        ws_max_queue=16,
        ws_per_message_deflate=False,
        ws_ping_interval=10,
        ws_ping_timeout=20,
        timeout_graceful_shutdown=2,
    )


class Bucket:
    """Counts messages: `rate` a second, and `burst` at once."""

    def __init__(self, rate: float = RATE, burst: float = BURST):
        self._rate, self._burst = rate, burst
        self._left, self._at = burst, time.monotonic()

    def take(self) -> bool:
        """Whether one more is allowed."""
        now = time.monotonic()
        self._left = min(self._burst, self._left + (now - self._at) * self._rate) - 1
        self._at = now
        return self._left >= 0


class Live:
    """The routes over a lobby."""

    def __init__(self, lobby: Lobby, seed: int = 0):
        self.lobby, self._seed = lobby, seed
        self._sockets = 0
        folder = importlib.resources.files("sanawm_jax.live") / "page"
        self._page = {
            path: ((folder / name).read_bytes(), kind) for path, (name, kind) in _PAGE.items()
        }
        self._shelf = {}

    def app(self) -> Starlette:
        """The application, without the checks of `security.Guard`."""
        get = {"/file/poses.npy": self._poses, "/file/actions.txt": self._actions}
        get |= {"/file/walk.json": self._walk, "/file/video.mp4": self._video}
        get |= {"/file/world.safetensors": self._world, "/scene/{number:int}.jpg": self._scene}
        post = {"/file/image": self._take_image, "/file/walk": self._take_walk}
        post |= {"/file/world": self._take_world}
        return Starlette(
            routes=[
                *(Route(path, self._static, methods=["GET"]) for path in self._page),
                *(Route(path, _answered(f), methods=["GET"]) for path, f in get.items()),
                *(Route(path, _answered(f), methods=["POST"]) for path, f in post.items()),
                WebSocketRoute("/live", self._live),
            ],
            lifespan=self._lifespan,
        )

    @contextlib.asynccontextmanager
    async def _lifespan(self, _: Starlette) -> AsyncIterator[None]:
        async def tick() -> None:
            while True:
                await asyncio.sleep(1)
                self.lobby.tick()

        ticking = asyncio.create_task(tick())
        try:
            yield
        finally:
            ticking.cancel()
            await self.lobby.close()

    async def _static(self, request: Request) -> Response:
        content, kind = self._page[request.url.path]
        return Response(content, media_type=kind)

    # The socket.

    async def _live(self, socket: WebSocket) -> None:
        await socket.accept()
        connection, name = Connection(socket), ""
        self._sockets += 1
        sending = None
        try:
            if self._sockets > MAX_SOCKETS:
                raise protocol.ProtocolError("full", "too many pages are open")
            name = await self._hello(socket, connection)
            sending = asyncio.create_task(connection.send_all())
            await self._hear(socket, connection, name, sending)
        except protocol.ProtocolError as error:
            await _refuse(socket, error.code, str(error))
        except (WebSocketDisconnect, TimeoutError, RuntimeError, OSError):
            pass
        finally:
            self._sockets -= 1
            if sending is not None:
                sending.cancel()
                with contextlib.suppress(BaseException):
                    await sending
            self.lobby.leave(connection, name)
            with contextlib.suppress(Exception):
                await asyncio.wait_for(socket.close(), 1)

    async def _hello(self, socket: WebSocket, connection: Connection) -> str:
        try:
            message = await asyncio.wait_for(_receive(socket), HELLO)
        except TimeoutError:
            raise protocol.ProtocolError("bad_message", "no hello came") from None
        if not isinstance(message, protocol.Hello):
            raise protocol.ProtocolError("bad_message", "the first message must be hello")
        if message.version != protocol.VERSION:
            raise protocol.ProtocolError(
                "wrong_version",
                f"the page speaks protocol {message.version}, the server {protocol.VERSION}; "
                "reload the page",
            )
        return self.lobby.enter(connection, message.session)

    async def _hear(
        self, socket: WebSocket, connection: Connection, name: str, sending: asyncio.Task
    ) -> None:
        bucket = Bucket()
        while True:
            hearing = asyncio.ensure_future(_receive(socket))
            try:
                await asyncio.wait({hearing, sending}, return_when=asyncio.FIRST_COMPLETED)
                if sending.done():
                    if connection.ended:
                        raise protocol.ProtocolError(connection.ended, _WHY[connection.ended])
                    sending.result()  # raises what ended it
                message = await hearing
            finally:
                hearing.cancel()
            if not bucket.take():
                raise protocol.ProtocolError("too_many_messages", f"more than {RATE:g} a second")
            if isinstance(message, protocol.Hello):
                raise protocol.ProtocolError("bad_message", "a second hello")
            if isinstance(message, protocol.Ping):
                connection.push(protocol.Pong(message.at, time.time() * 1e3))
                continue
            seat = self.lobby.seat(name)
            if seat is not None and seat.connection is connection:
                seat.session.act(message)

    # Files.

    def _session(self, request: Request) -> Session:
        seat = self.lobby.seat(request.headers.get("x-session", ""))
        if seat is None:
            raise InputError("the session has ended; reload the page")
        return seat.session

    async def _do(self, request: Request, job: Callable[[Session], Any]) -> Any:
        session = self._session(request)
        return await asyncio.wrap_future(session.do(lambda: job(session)))

    async def _scene(self, request: Request) -> Response:
        number, scenes = request.path_params["number"], self.lobby.engine.scenes
        if number >= len(scenes):
            return Response(status_code=404)
        if number not in self._shelf:
            self._shelf[number] = thumbnail(scenes[number].pixels())
        return Response(self._shelf[number], media_type="image/jpeg")

    async def _poses(self, request: Request) -> Response:
        walk = await self._do(request, files.walk_of)
        return _download(files.npy(walk.poses), "poses.npy", "application/octet-stream")

    async def _actions(self, request: Request) -> Response:
        walk = await self._do(request, files.walk_of)
        return _download(files.action_string(walk).encode(), "actions.txt", "text/plain")

    async def _walk(self, request: Request) -> Response:
        def job(session: Session) -> bytes:
            files.walk_of(session)
            return walk_file(session.timeline, session.node, self._seed)

        return _download(await self._do(request, job), "walk.json", "application/json")

    async def _video(self, request: Request) -> Response:
        overlay = request.query_params.get("overlay") == "1"
        walk = await self._do(request, files.walk_of)
        fps = self.lobby.engine.fps
        return await _written(
            "video.mp4", "video/mp4", lambda file: files.video(walk, file, fps, overlay=overlay)
        )

    async def _world(self, request: Request) -> Response:
        state = await self._do(request, lambda session: session.moment())
        return await _written(
            "world.safetensors",
            "application/octet-stream",
            lambda file: files.save_world(state, file),
        )

    async def _take_image(self, request: Request) -> Response:
        engine, session = self.lobby.engine, self._session(request)
        prompt = request.query_params.get("prompt", "") or session.scene.prompt
        try:
            prompt = protocol.checked_prompt(prompt)
        except ValueError as error:
            raise InputError(f"the prompt must be {error}") from None
        data = await _body(request, files.MAX_IMAGE)
        scene = await asyncio.to_thread(files.read_scene, data, prompt, engine.height, engine.width)
        await self._do(request, lambda session: session.begin(scene))
        return JSONResponse({"scene": scene.name})

    async def _take_walk(self, request: Request) -> Response:
        data = await _body(request, files.MAX_WALK)
        begin, seed, steps = await asyncio.to_thread(read_walk, data)
        if seed != self._seed:
            raise InputError(f"the walk was made with --seed {seed}; this server has {self._seed}")
        await self._do(request, lambda session: session.replay(begin, steps))
        return JSONResponse({"chunks": len(steps)})

    async def _take_world(self, request: Request) -> Response:
        most = await self._do(request, files.largest_world)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "world.safetensors"
            await _body(request, most, file)
            await self._do(request, lambda session: files.load_world(session, file))
        return JSONResponse({"loaded": True})


_WHY = {
    "replaced": "the session is open in another window",
    "too_slow": "the page does not take what it is sent",
}


async def _receive(socket: WebSocket) -> protocol.PageMessage:
    raw = await socket.receive()
    if raw["type"] == "websocket.disconnect":
        raise WebSocketDisconnect(raw.get("code", 1000))
    if raw.get("text") is None:
        raise protocol.ProtocolError("bad_message", "messages to the server are texts")
    return protocol.parse(raw["text"])


async def _refuse(socket: WebSocket, code: str, reason: str) -> None:
    if socket.application_state is not WebSocketState.CONNECTED:
        return
    with contextlib.suppress(Exception):
        async with asyncio.timeout(2):
            await socket.send_text(protocol.Failure(code, reason).encode())
            await socket.close(protocol.CODES[code], reason[:120])


def _answered(handler: Callable[[Request], Any]) -> Callable[[Request], Any]:
    """Bad input becomes status 400 with a reason."""

    async def handle(request: Request) -> Response:
        try:
            return await handler(request)
        except InputError as error:
            return JSONResponse({"code": "refused", "reason": str(error)}, 400)

    return handle


async def _body(request: Request, most: int, file: Path | None = None) -> bytes:
    """The body, in memory or in a file.

    Raises:
      InputError: it has more than `most` bytes.
    """
    parts, size = [], 0
    with file.open("wb") if file else contextlib.nullcontext() as out:
        async for part in request.stream():
            size += len(part)
            if size > most:
                raise InputError(f"the file is larger than {most / 2**20:.0f} MiB")
            if out is not None:
                out.write(part)
            else:
                parts.append(part)
    return b"".join(parts)


def _download(content: bytes, name: str, kind: str) -> Response:
    headers = {"Content-Disposition": f'attachment; filename="{name}"'}
    return Response(content, media_type=kind, headers=headers)


async def _written(name: str, kind: str, write: Callable[[Path], None]) -> Response:
    """A file that `write` makes in a folder of its own, which is removed after it was sent."""
    folder = tempfile.TemporaryDirectory()
    try:
        file = Path(folder.name) / name
        await asyncio.to_thread(write, file)
    except BaseException:
        folder.cleanup()
        raise
    return FileResponse(
        file, media_type=kind, filename=name, background=BackgroundTask(folder.cleanup)
    )
