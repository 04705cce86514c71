"""The server through real sockets: visitors, safety, files. No browser and no weights."""

from __future__ import annotations

import io
import json
import random
import socket
import struct
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from PIL import Image
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from sanawm_jax.live import lobby as lobby_module
from sanawm_jax.live import protocol, server
from sanawm_jax.live.model_free import ModelFreeEngine
from tests.live_server import Page, Running, serving
from tests.unit.live.test_protocol import damaged

Answer = tuple[int, bytes]


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    with serving(ModelFreeEngine(32, 32)) as found:
        yield found


@pytest.fixture
def page(running: Running) -> Iterator[Page]:
    """A page that walks; afterwards its seat is free."""
    found = running.open()
    found.until("status", state="running")
    yield found
    found.connection.close()
    for seat in list(running.lobby.seats.values()):
        seat.session.close()
    wait(lambda: not running.lobby.seats)


def wait(condition: Any) -> None:
    end = time.monotonic() + 15
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def ask(
    running: Running, path: str, body: bytes | None = None, session: str = "", **headers: str
) -> Answer:
    headers = {"x-session": session, **{k.replace("_", "-"): v for k, v in headers.items()}}
    request = urllib.request.Request(running.url + path, body, headers)
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def name_of(page: Page) -> str:
    return next(text["session"] for text in page.texts if text["type"] == "welcome")


def closed(page: Page) -> tuple[int, str]:
    """Waits for the server to close the socket."""
    try:
        while True:
            page.hear(15)
    except ConnectionClosed as error:
        assert error.rcvd is not None
        return error.rcvd.code, error.rcvd.reason


def test_keys_change_the_next_chunk(running: Running, page: Page) -> None:
    page.frame()
    sent = time.monotonic()
    page.send({"type": "control", "number": 5, "at": 123.5, "keys": "w"})
    while True:
        picture, sent_ms, jpeg = page.frame()
        if picture.input == 5:
            break
        assert time.monotonic() < sent + 10
    assert picture.input_ms == 123.5 and jpeg[:2] == b"\xff\xd8"
    assert 0 <= time.time() * 1e3 - sent_ms < 5000
    first = picture.z
    while page.frame()[0].z <= first:
        assert time.monotonic() < sent + 10


def test_frames_are_paced(running: Running, page: Page) -> None:
    numbers, times = [], []
    while len(times) < 40:
        numbers.append(page.frame()[0].number)
        times.append(time.monotonic())
    assert numbers == list(range(numbers[0], numbers[0] + 40))
    rate = 32 / (times[-1] - times[7])
    assert rate < 17  # never faster than the video


def test_one_walks_and_others_wait(running: Running, page: Page) -> None:
    second, third = running.open(), running.open()
    assert second.until("status")["place"] == 1
    assert third.until("status", place=2)["state"] == "waiting"
    third.send({"type": "reset"})  # has no effect from the line
    page.frame()
    running.loop.call_soon_threadsafe(running.session().close)
    assert page.until("status", state="ended")
    assert second.until("status", state="running")
    assert third.until("status", place=1)
    third.connection.close()
    second.connection.close()


def test_a_reloaded_page_finds_its_world(running: Running, page: Page) -> None:
    page.until("chunk", depth=2)
    name = name_of(page)
    page.connection.close()
    again = running.open(name)
    assert again.until("welcome")["session"] == name
    again.until("chunk", depth=2)
    other = running.open(name)  # a copy of the window takes over
    other.until("chunk", depth=2)
    assert closed(again) == (4409, "the session is open in another window")
    other.connection.close()


def test_a_visitor_that_vanishes_makes_room(
    running: Running, page: Page, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lobby_module, "GRACE", 0.2)
    session = running.session()
    page.connection.close()
    wait(lambda: not running.lobby.seats)
    assert session.join(5) and not hasattr(session, "world") and not hasattr(session, "timeline")


@pytest.mark.parametrize(
    ("message", "code"),
    [
        ("nonsense", 4400),
        ('{"type":"control","number":"x"}', 4400),
        ('{"type":"hello","version":1}', 4400),
        ("[" * 70_000, 4413),
        (b"\x00\x01", 4400),
    ],
)
def test_a_bad_message_ends_its_socket_alone(
    running: Running, page: Page, message: Any, code: int
) -> None:
    name = name_of(page)
    page.connection.send(message)
    found, reason = closed(page)
    assert found == code and reason and page.texts[-1]["type"] == "error"
    assert running.open(name).until("status", state="running")


def test_another_version_is_refused(running: Running) -> None:
    page = Page(connect(f"ws://{running.address}/live"))
    page.send({"type": "hello", "version": 99})
    code, reason = closed(page)
    assert code == 4402 and "reload" in reason


def test_too_many_messages(running: Running, page: Page) -> None:
    for number in range(int(server.BURST) + 200):
        try:
            page.send({"type": "control", "number": number})
        except ConnectionClosed:
            break
    assert closed(page)[0] == 4429


def test_ten_thousand_damaged_messages(
    running: Running, page: Page, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each socket gets damaged messages until one ends it; the walk goes on."""
    monkeypatch.setattr(server, "RATE", 1e9)
    monkeypatch.setattr(server.Bucket.__init__, "__defaults__", (1e9, 1e9))
    name, sent, seed = name_of(page), 0, 0
    threads = threading.active_count()
    page.connection.close()
    while sent < 10_000:
        with connect(f"ws://{running.address}/live", compression=None) as raw:
            fuzzed = Page(raw)
            fuzzed.send({"type": "hello", "version": 1, "session": name})
            try:
                # a burst, as most sockets end within a few
                for _ in range(60):
                    text = damaged(seed).encode("utf-8", "replace").decode()
                    seed += 1
                    sent += 1
                    raw.send(text)
            except ConnectionClosed:
                pass
    again = running.open(name)
    again.until("status")
    again.send({"type": "reset"})
    again.until("status", state="running")
    again.frame()
    wait(lambda: running.lobby.seats.get(name) and threading.active_count() <= threads + 4)


def test_a_thousand_random_messages_that_are_valid(
    running: Running, page: Page, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server.Bucket.__init__, "__defaults__", (1e9, 1e9))
    name, rng = name_of(page), random.Random(0)
    page.connection.close()
    page = running.open(name)

    def message() -> dict[str, Any]:
        return rng.choice(
            [
                {"type": "control", "number": 1, "keys": rng.choice(["w", "wd", "", "ijkl"])},
                {"type": "control", "number": 2, "look": [rng.uniform(-90, 90), 90]},
                {"type": "control", "number": 3, "stick": [rng.uniform(-1, 1)] * 4, "move": 4},
                {"type": "pause", "on": rng.random() < 0.5},
                {"type": "prompt", "text": rng.choice(["a", "\U0001f600\n", "x" * 2000])},
                {"type": "go", "node": rng.randrange(40)},
                {"type": "reset"},
                {"type": "scene", "name": rng.choice(["day", "night", "none", "../x"])},
                {"type": "path", "points": [[rng.uniform(-9, 9)] * 2 for _ in range(3)]},
                {"type": "stop"},
                {"type": "ping", "at": 1e15},
            ]
        )

    for _ in range(1000):
        page.send(message())
        if rng.random() < 0.1:
            page.hear()
    page.send({"type": "scene", "name": "day"})
    page.send({"type": "ping", "at": 7})
    page.until("pong", at=7)
    page.send({"type": "control", "number": 9})
    while page.frame()[0].input != 9:
        pass


def test_a_slow_page_does_not_hold_the_model(
    running: Running, page: Page, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lobby_module, "SEND", 3.0)
    name = name_of(page)
    page.connection.close()
    raw = socket.create_connection(("127.0.0.1", running.port))
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    raw.sendall(
        f"GET /live HTTP/1.1\r\nHost: {running.address}\r\nUpgrade: websocket\r\n"
        "Connection: Upgrade\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
        "Sec-WebSocket-Version: 13\r\n\r\n".encode()
    )
    assert b"101" in raw.recv(1024)
    hello = json.dumps({"type": "hello", "version": 1, "session": name}).encode()
    mask = struct.pack("<I", 0)
    raw.sendall(bytes([0x81, 0x80 | len(hello)]) + mask + hello)
    wait(lambda: running.lobby.seats[name].connection is not None)
    connection = running.lobby.seats[name].connection
    before = len(running.session().timeline.nodes)
    filler = protocol.Failure("refused", "x" * 200_000)
    for _ in range(40):
        running.loop.call_soon_threadsafe(connection.push, filler)
    wait(lambda: len(running.session().timeline.nodes) > before + 2)
    wait(lambda: running.lobby.seats[name].connection is None)
    raw.close()


def test_files_come_and_go(running: Running, page: Page) -> None:
    name = name_of(page)
    page.send({"type": "control", "number": 1, "keys": "w"})
    page.until("chunk", depth=3)
    page.send({"type": "pause", "on": True})
    page.until("status", state="paused")
    status, poses = ask(running, "file/poses.npy", session=name)
    assert status == 200 and np.load(io.BytesIO(poses)).shape[1:] == (4, 4)
    assert b"w-" in ask(running, "file/actions.txt", session=name)[1]
    assert b"ftyp" in ask(running, "file/video.mp4?overlay=1", session=name)[1][:32]
    status, walk = ask(running, "file/walk.json", session=name)
    assert status == 200 and json.loads(walk)["seed"] == 7
    assert ask(running, "file/walk", walk, name)[0] == 200
    played = page.until("played")
    assert played["equal"] == played["compared"] == played["chunks"] >= 3
    status, world = ask(running, "file/world.safetensors", session=name)
    assert status == 200
    assert ask(running, "file/world", world, name)[0] == 200
    page.until("forget")
    picture = io.BytesIO()
    Image.new("RGB", (90, 50), "red").save(picture, "PNG")
    status, answer = ask(running, "file/image?prompt=red", picture.getvalue(), name)
    assert status == 200 and json.loads(answer)["scene"].startswith("upload-")
    assert page.until("status", prompt="red")


@pytest.mark.parametrize(
    ("path", "body", "reason"),
    [
        ("file/image", b"GIF89a", "no PNG, JPEG or WebP"),
        ("file/image", b"", "no PNG, JPEG or WebP"),
        ("file/walk", b"{}", "no recorded walk"),
        ("file/world", b"junk", "cannot be read"),
        ("file/world", bytes(3 << 20), "larger than"),
        ("file/image?prompt=%00", b"", "control characters"),
    ],
)
def test_bad_files_are_refused(
    running: Running, page: Page, path: str, body: bytes, reason: str
) -> None:
    status, answer = ask(running, path, body, name_of(page))
    assert status == 400 and reason in json.loads(answer)["reason"]
    page.frame()


def test_a_picture_with_too_many_pixels(running: Running, page: Page) -> None:
    file = io.BytesIO()
    Image.new("1", (9000, 9000)).save(file, "PNG")
    status, answer = ask(running, "file/image", file.getvalue(), name_of(page))
    assert status == 400 and b"million pixels" in answer


def test_files_need_a_session(running: Running) -> None:
    assert ask(running, "file/poses.npy", session="guess")[0] == 400
    assert ask(running, "file/walk", b"{}")[0] == 400


@pytest.mark.parametrize("path", ["../setup.cfg", "file/../app.js", "page/app.js", "%2e%2e/x"])
def test_paths_are_names_of_a_table(running: Running, path: str) -> None:
    assert ask(running, path)[0] in (404, 405)


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "", "127.0.0.1.evil.example"])
def test_another_host_is_refused(running: Running, host: str) -> None:
    assert ask(running, "", Host=host)[0] in (400, 421)
    with pytest.raises(InvalidStatus):
        connect(
            f"ws://{running.address}/live", additional_headers={"Origin": "http://evil.example"}
        )


def test_another_origin_is_refused(running: Running, page: Page) -> None:
    status, _ = ask(running, "file/walk", b"{}", name_of(page), Origin="http://evil.example")
    assert status == 421
    own = f"http://{running.address}"
    assert ask(running, "file/walk", b"{}", name_of(page), Origin=own)[0] == 400  # a damaged walk
    status, content = ask(running, "")
    assert status == 200 and b'<canvas id="view"' in content


def test_a_token_is_asked_for() -> None:
    with serving(ModelFreeEngine(16, 16), token="secret") as running:
        status, content = ask(running, "")
        assert status == 403 and b"Token needed" in content
        assert ask(running, "?token=guess")[0] == 403
        assert ask(running, "app.js")[0] == 403
        with pytest.raises(InvalidStatus):
            running.open()
        assert ask(running, "", Cookie="sanawm_live=secret")[0] == 200
        page = running.open(additional_headers={"Cookie": "sanawm_live=secret"})
        page.until("status", state="running")
        opener = urllib.request.build_opener(urllib.request.HTTPCookieProcessor())
        assert b"<canvas" in opener.open(running.url + "?token=secret", timeout=10).read()


def test_many_sockets(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lobby_module, "MAX_WAITING", 3)
    pages = [running.open() for _ in range(4)]
    pages[3].until("status", place=3)
    last = running.open()
    assert closed(last)[0] == 4503
    for page in pages[::-1]:
        page.connection.close()
    wait(lambda: not running.lobby.line)
    for seat in list(running.lobby.seats.values()):
        seat.session.close()
    wait(lambda: not running.lobby.seats)
