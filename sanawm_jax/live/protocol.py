"""Everything that the page and the server say to each other; docs/live.md describes it.

The page sends JSON texts, one of the classes in `FROM_PAGE`. The server sends JSON texts, one of
those in `FROM_SERVER`, and pictures as binary messages: the header `HEADER` and a JPEG.
"""

from __future__ import annotations

import dataclasses
import json
import struct
import unicodedata
from collections.abc import Callable
from typing import Any, ClassVar

from sanawm_jax.camera.actions import ACTION_KEYS

VERSION = 1
MAX_TEXT = 64 * 1024  # bytes of one message
MAX_PROMPT = 2000  # characters
MAX_POINTS = 512  # of a drawn path
MAX_NUMBER = 2**31 - 1
MAX_DISTANCE = 1e4  # of a drawn path's points from the origin, in units of the poses
FASTEST = 4.0  # times the mapping's speed
WIDEST_LOOK = 90.0  # degrees that the mouse turns the camera in one message

# kind, protocol version, generation, number of the frame, node of the timeline, newest control that
# acted, time of that control (page's clock), seconds of the model, time of sending (server's
# clock), position x z and heading; times in milliseconds, heading in radians to the right of +z
HEADER = struct.Struct("<BBHIIIdddfff")
FRAME, THUMBNAIL = 1, 2


class ProtocolError(ValueError):
    """A message that ends its connection.

    Attributes:
      code: one word for programs, one of `CODES`.
    """

    def __init__(self, code: str, reason: str):
        super().__init__(reason)
        self.code = code


# what ends a connection, and the code with which its socket is closed
CODES = {
    "bad_message": 4400,
    "wrong_version": 4402,
    "too_slow": 4408,
    "too_large": 4413,
    "too_many_messages": 4429,
    "full": 4503,
    "replaced": 4409,
}


@dataclasses.dataclass(frozen=True)
class Picture:
    """The header of a binary message; see `HEADER`."""

    kind: int
    generation: int
    number: int
    node: int
    input: int = 0
    input_ms: float = 0.0
    model_ms: float = 0.0
    x: float = 0.0
    z: float = 0.0
    heading: float = 0.0

    def pack(self, sent_ms: float) -> bytes:
        """The header's bytes."""
        return HEADER.pack(
            self.kind,
            VERSION,
            self.generation % 2**16,
            self.number,
            self.node,
            self.input,
            self.input_ms,
            self.model_ms,
            sent_ms,
            self.x,
            self.z,
            self.heading,
        )


def unpack(message: bytes) -> tuple[Picture, float, bytes]:
    """A binary message: its header, when it was sent in ms, and the JPEG."""
    kind, version, *rest = HEADER.unpack_from(message)
    if version != VERSION:
        raise ProtocolError("wrong_version", f"the picture is of protocol {version}")
    sent_ms = rest.pop(6)
    return Picture(kind, *rest), sent_ms, message[HEADER.size :]


def _text(longest: int, *, empty: bool = True) -> Any:
    def check(value: Any) -> str:
        if not isinstance(value, str) or len(value) > longest or not (empty or value.strip()):
            raise ValueError(f"a text of {0 if empty else 1} to {longest} characters")
        if any(unicodedata.category(letter) in ("Cc", "Cs") for letter in value if letter != "\n"):
            raise ValueError("a text without control characters")
        return value

    return check


def _number(low: float, high: float, *, whole: bool = False) -> Callable[[Any], Any]:
    def check(value: Any) -> Any:
        is_number = isinstance(value, int if whole else int | float)
        if not is_number or isinstance(value, bool) or not low <= value <= high:
            raise ValueError(f"a {'whole ' * whole}number from {low} to {high}")
        return value if whole else float(value)

    return check


def _list(each: Callable[[Any], Any], least: int, most: int) -> Callable[[Any], Any]:
    def check(value: Any) -> tuple:
        if not isinstance(value, list) or not least <= len(value) <= most:
            raise ValueError(f"a list of {least} to {most} entries")
        return tuple(each(item) for item in value)

    return check


def _keys(value: Any) -> frozenset[str]:
    if not isinstance(value, str) or len(value) > 8 or set(value) - ACTION_KEYS:
        raise ValueError("letters of wasdijkl")
    return frozenset(value)


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("true or false")
    return value


checked_prompt = _text(MAX_PROMPT, empty=False)
_COUNT = _number(0, MAX_NUMBER, whole=True)
_CLOCK = _number(0, 1e15)


def _field(check: Callable[[Any], Any], default: Any = dataclasses.MISSING) -> Any:
    return dataclasses.field(default=default, metadata={"check": check})


@dataclasses.dataclass(frozen=True)
class Hello:
    """The first message of a page. `session` continues a session after a reload."""

    type: ClassVar[str] = "hello"
    version: int = _field(_COUNT)
    session: str = _field(_text(64), "")


@dataclasses.dataclass(frozen=True)
class Control:
    """Keys and sticks as they are now, and how far the mouse turned since the last message.

    Attributes:
      number: of the message, rising.
      at: the page's clock in ms, which comes back with the first picture that it changed.
      keys: held keys.
      stick: forward, strafe, yaw and pitch in [-1, 1]; 1 is the speed of a key.
      look: degrees to the right and upwards.
      move, turn: factors of the speeds.
    """

    type: ClassVar[str] = "control"
    number: int = _field(_COUNT)
    at: float = _field(_CLOCK, 0.0)
    keys: frozenset[str] = _field(_keys, frozenset())
    stick: tuple[float, ...] = _field(_list(_number(-1, 1), 4, 4), (0.0, 0.0, 0.0, 0.0))
    look: tuple[float, ...] = _field(_list(_number(-WIDEST_LOOK, WIDEST_LOOK), 2, 2), (0.0, 0.0))
    move: float = _field(_number(0.1, FASTEST), 1.0)
    turn: float = _field(_number(0.1, FASTEST), 1.0)


@dataclasses.dataclass(frozen=True)
class Pause:
    """Stops, or goes on."""

    type: ClassVar[str] = "pause"
    on: bool = _field(_flag)


@dataclasses.dataclass(frozen=True)
class Prompt:
    """New words, which act from the next chunk on."""

    type: ClassVar[str] = "prompt"
    text: str = _field(checked_prompt)


@dataclasses.dataclass(frozen=True)
class Go:
    """Goes to a node of the timeline and waits there; 0 is the start."""

    type: ClassVar[str] = "go"
    node: int = _field(_COUNT)


@dataclasses.dataclass(frozen=True)
class Reset:
    """Goes to the start and walks on from there."""

    type: ClassVar[str] = "reset"


@dataclasses.dataclass(frozen=True)
class Scene:
    """Begins a new world from a start scene of the shelf."""

    type: ClassVar[str] = "scene"
    name: str = _field(_text(64, empty=False))


@dataclasses.dataclass(frozen=True)
class Path:
    """Walks along a path on the ground, given as points (x, z) in units of the poses."""

    type: ClassVar[str] = "path"
    points: tuple[tuple[float, ...], ...] = _field(
        _list(_list(_number(-MAX_DISTANCE, MAX_DISTANCE), 2, 2), 2, MAX_POINTS)
    )
    move: float = _field(_number(0.1, FASTEST), 1.0)


@dataclasses.dataclass(frozen=True)
class Stop:
    """Ends a path or a recording that is being played."""

    type: ClassVar[str] = "stop"


@dataclasses.dataclass(frozen=True)
class Ping:
    """Shows that the page is there; the answer is a Pong."""

    type: ClassVar[str] = "ping"
    at: float = _field(_CLOCK)


PageMessage = Hello | Control | Pause | Prompt | Go | Reset | Scene | Path | Stop | Ping
FROM_PAGE: dict[str, type] = {
    c.type: c for c in (Hello, Control, Pause, Prompt, Go, Reset, Scene, Path, Stop, Ping)
}


def parse(text: str) -> PageMessage:
    """Reads a message of a page.

    Raises:
      ProtocolError: it is none, and why.
    """
    if len(text.encode("utf-8", "surrogatepass")) > MAX_TEXT:
        raise ProtocolError("too_large", f"a message has at most {MAX_TEXT} bytes")
    try:
        raw = json.loads(text)
    except (ValueError, RecursionError):
        raise ProtocolError("bad_message", "the message is not JSON") from None
    kind = raw.pop("type", None) if isinstance(raw, dict) else None
    if not isinstance(kind, str) or kind not in FROM_PAGE:
        raise ProtocolError("bad_message", "the message has no known type")
    cls = FROM_PAGE[kind]
    fields = {field.name: field for field in dataclasses.fields(cls)}
    if raw.keys() - fields.keys():
        raise ProtocolError("bad_message", f"{kind} has a field that is not known")
    values = {}
    for name, field in fields.items():
        if name in raw:
            try:
                values[name] = field.metadata["check"](raw[name])
            except ValueError as error:
                raise ProtocolError("bad_message", f"{kind}.{name} must be {error}") from None
        elif field.default is dataclasses.MISSING:
            raise ProtocolError("bad_message", f"{kind} needs {name}")
    return cls(**values)


class ServerMessage:
    """A message of the server; a field's name is its name in JSON."""

    type: ClassVar[str]

    def encode(self) -> str:
        """The JSON text."""
        assert dataclasses.is_dataclass(self)
        return json.dumps({"type": self.type, **dataclasses.asdict(self)}, allow_nan=False)


@dataclasses.dataclass(frozen=True)
class Welcome(ServerMessage):
    """The answer to Hello: what runs here, and the start scenes."""

    type: ClassVar[str] = "welcome"
    version: int
    session: str
    model: str
    device: str
    width: int
    height: int
    fps: float
    move: float  # distance of one frame with a key held
    scenes: list[dict[str, str]]


@dataclasses.dataclass(frozen=True)
class Status(ServerMessage):
    """What the session does.

    Attributes:
      state: loading, waiting, running, paused or ended.
      detail: the stage of loading, or why it is paused or ended.
      place: place in the line of waiting visitors, from 1; 0 outside it.
      playing: chunks that are left of a path or recording.
    """

    type: ClassVar[str] = "status"
    state: str
    detail: str = ""
    place: int = 0
    generation: int = 0
    node: int = 0
    prompt: str = ""
    scene: str = ""
    playing: int = 0


@dataclasses.dataclass(frozen=True)
class Chunk(ServerMessage):
    """A node of the timeline; its thumbnail comes as a picture.

    Attributes:
      place: x, z of the camera and its heading at the last frame.
      keys: that were held.
    """

    type: ClassVar[str] = "chunk"
    node: int
    parent: int
    branch: int
    depth: int
    prompt: str
    keys: str
    place: list[float]


@dataclasses.dataclass(frozen=True)
class Forget(ServerMessage):
    """A new world: the timeline is empty."""

    type: ClassVar[str] = "forget"
    generation: int


@dataclasses.dataclass(frozen=True)
class Stats(ServerMessage):
    """Figures of the last chunk.

    Attributes:
      ahead: frames that are made and not yet sent.
      model_ms: time of the chunk.
      frames: of the chunk.
      dropped: frames that this connection was too slow for.
      kept_mib: memory of the timeline.
    """

    type: ClassVar[str] = "stats"
    ahead: int
    model_ms: float
    frames: int
    dropped: int
    kept_mib: float


@dataclasses.dataclass(frozen=True)
class Played(ServerMessage):
    """A path or recording has ended; `equal` of `compared` chunks have the recorded pixels."""

    type: ClassVar[str] = "played"
    chunks: int
    compared: int
    equal: int


@dataclasses.dataclass(frozen=True)
class Pong(ServerMessage):
    """The answer to Ping."""

    type: ClassVar[str] = "pong"
    at: float
    server_ms: float


@dataclasses.dataclass(frozen=True)
class Failure(ServerMessage):
    """What went wrong. A code of `CODES` closes the socket; `refused` does not."""

    type: ClassVar[str] = "error"
    code: str
    reason: str


FROM_SERVER: dict[str, type] = {
    c.type: c for c in (Welcome, Status, Chunk, Forget, Stats, Played, Pong, Failure)
}
