"""Visitors: who has a seat, who waits, and what is sent to whom. All of it runs on the event loop.

A page that is reloaded comes back to its session. A session without a page ends after a while, and
its memory returns; the next visitor in the line gets the seat.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import secrets
import time
from collections.abc import Callable

from starlette.websockets import WebSocket

from sanawm_jax.live import protocol
from sanawm_jax.live.engine import Engine
from sanawm_jax.live.session import BUDGET, Event, Frames, Session

GRACE = 20.0  # seconds that a session waits for its page to come back
SHORT_GRACE = 4.0  # the same while others wait for the seat
TURN = 120.0  # seconds without a control after which a visitor makes room for others
SEND = 20.0  # seconds after which a message that is not taken ends the connection
MAX_WAITING = 32
_MAX_QUEUED = 64 << 20  # bytes of messages that a page has not taken yet


class Connection:
    """One page's socket, and what is to be sent there."""

    def __init__(self, socket: WebSocket):
        self.socket = socket
        self.ended: str | None = None  # the code of `protocol.CODES` that ended it
        self._texts: collections.deque[str | tuple[protocol.Picture, bytes]] = collections.deque()
        self._frames: collections.deque[tuple[float, protocol.Picture, bytes]]
        self._frames = collections.deque()
        self._something = asyncio.Event()
        self._queued = self._dropped = self._generation = 0

    def push(self, event: Event) -> None:
        """Queues an event; never waits."""
        if isinstance(event, Frames):
            self._push_frames(event)
        else:
            if isinstance(event, protocol.Status | protocol.Forget):
                self._set_generation(event.generation)
            if isinstance(event, protocol.Stats):
                event = dataclasses.replace(event, dropped=self._dropped)
            item = event.encode() if isinstance(event, protocol.ServerMessage) else event
            self._queued += _size(item)
            self._texts.append(item)
            if self._queued > _MAX_QUEUED:
                self.end("too_slow")
        self._something.set()

    def end(self, code: str) -> None:
        """Asks the sender to close the socket."""
        self.ended = self.ended or code
        self._something.set()

    def _set_generation(self, generation: int) -> None:
        if generation and generation != self._generation:
            self._frames.clear()
            self._generation = generation

    def _push_frames(self, event: Frames) -> None:
        if not event.pictures:
            return
        self._set_generation(event.pictures[0][0].generation)
        for i, (picture, jpeg) in enumerate(event.pictures):
            self._frames.append((event.start + i * event.interval, picture, jpeg))
        # the chunk that is shown, and one ahead of it
        while len(self._frames) > 2 * len(event.pictures):
            self._frames.popleft()
            self._dropped += 1

    async def send_all(self) -> None:
        """Sends what comes until the connection ends."""
        while self.ended is None:
            self._something.clear()
            if self._texts:
                item = self._texts.popleft()
                self._queued -= _size(item)
            elif self._frames and self._frames[0][0] <= time.monotonic():
                item = self._frames.popleft()[1:]
            else:
                due = self._frames[0][0] - time.monotonic() if self._frames else None
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._something.wait(), due)
                continue
            async with asyncio.timeout(SEND):
                if isinstance(item, str):
                    await self.socket.send_text(item)
                else:
                    await self.socket.send_bytes(item[0].pack(time.time() * 1e3) + item[1])


def _size(item: str | tuple[protocol.Picture, bytes]) -> int:
    return len(item) if isinstance(item, str) else len(item[1])


@dataclasses.dataclass
class Seat:
    """A session and the page that looks at it, if one does."""

    name: str
    session: Session
    connection: Connection | None
    left: float = 0.0  # time at which the page went


class Lobby:
    """See the module.

    Args:
      engine: the model.
      seats: sessions at a time.
      budget: bytes of each session's timeline.
    """

    def __init__(self, engine: Engine, seats: int = 1, budget: int = BUDGET):
        self.engine, self._budget = engine, budget
        self._room = seats
        self.seats: dict[str, Seat] = {}
        self.line: list[tuple[str, Connection]] = []
        self._stage: str | None = "starting"

    def set_stage(self, stage: str | None) -> None:
        """What loading does at the moment; None when it is done."""
        self._stage = stage
        if stage is None:
            self._seat_next()
        for _, connection in self.line:
            self._tell_place(connection)

    def enter(self, connection: Connection, name: str) -> str:
        """A page has come; returns the name of its session.

        Raises:
          ProtocolError: too many wait already.
        """
        seat = self.seats.get(name)
        if seat is not None:
            if seat.connection is not None:
                seat.connection.end("replaced")
            self._welcome(connection, name)
            seat.connection = connection
            seat.session.watch(True)
            seat.session.do(seat.session.tell_all)
            return name
        if len(self.line) >= MAX_WAITING:
            raise protocol.ProtocolError("full", "too many visitors wait already; come back later")
        name = secrets.token_urlsafe(24)
        self._welcome(connection, name)
        self.line.append((name, connection))
        self._seat_next()
        if name not in self.seats:
            self._tell_place(connection)
        return name

    def leave(self, connection: Connection, name: str) -> None:
        """A page has gone."""
        self.line = [entry for entry in self.line if entry[1] is not connection]
        seat = self.seats.get(name)
        if seat is not None and seat.connection is connection:
            seat.connection, seat.left = None, time.monotonic()
            seat.session.watch(False)
        self._tell_places()

    def seat(self, name: str) -> Seat | None:
        """The seat of a session."""
        return self.seats.get(name)

    def tick(self) -> None:
        """Ends sessions that nobody looks at, and turns that are over; call it every second."""
        now = time.monotonic()
        for seat in list(self.seats.values()):
            if seat.connection is None:
                if now - seat.left > (min(GRACE, SHORT_GRACE) if self.line else GRACE):
                    seat.session.close()
            elif self.line and now - seat.session.touched > TURN:
                seat.session.close("others were waiting, and no key was pressed for a while")

    async def close(self) -> None:
        """Ends all sessions."""
        for seat in list(self.seats.values()):
            seat.session.close("the server has ended")
        for seat in list(self.seats.values()):
            await asyncio.to_thread(seat.session.join, 5.0)

    def _welcome(self, connection: Connection, name: str) -> None:
        engine = self.engine
        connection.push(
            protocol.Welcome(
                protocol.VERSION,
                name,
                engine.name,
                engine.device,
                engine.width,
                engine.height,
                engine.fps,
                engine.rule.translation_speed,
                [{"name": s.name, "title": s.title, "prompt": s.prompt} for s in engine.scenes],
            )
        )

    def _seat_next(self) -> None:
        while self._stage is None and self.line and len(self.seats) < self._room:
            name, connection = self.line.pop(0)
            session = Session(self.engine, self._publisher(name), self._budget)
            self.seats[name] = Seat(name, session, connection)
            session.start()
        self._tell_places()

    def _publisher(self, name: str) -> Callable[[Event], None]:
        loop = asyncio.get_running_loop()

        def publish(event: Event) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(self._deliver, name, event)

        return publish

    def _deliver(self, name: str, event: Event) -> None:
        seat = self.seats.get(name)
        if seat is None:
            return
        if seat.connection is not None:
            seat.connection.push(event)
        if isinstance(event, protocol.Status) and event.state == "ended":
            del self.seats[name]
            self._seat_next()

    def _tell_places(self) -> None:
        for _, connection in self.line:
            self._tell_place(connection)

    def _tell_place(self, connection: Connection) -> None:
        place = next(i for i, entry in enumerate(self.line, 1) if entry[1] is connection)
        if self._stage is not None:
            connection.push(protocol.Status("loading", self._stage))
        else:
            detail = f"number {place} in the line"
            connection.push(protocol.Status("waiting", detail, place=place))
