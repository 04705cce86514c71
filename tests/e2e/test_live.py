"""`python -m sanawm_jax.live`, as a person or a script starts it."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from sanawm_jax.live import protocol
from sanawm_jax.live.__main__ import bind
from sanawm_jax.runtime.errors import InputError
from sanawm_jax.runtime.shipped import ASSETS
from tests.live_server import Page

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "sanawm_jax.live", "--no_open"]


def start(*words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*COMMAND, *words], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_ready_pictures_and_a_clean_end() -> None:
    with start("--model_free", "--port=0") as server:
        try:
            assert server.stdout is not None
            line = server.stdout.readline()
            url = line.removeprefix("ready ").strip()
            assert line == f"ready {url}\n" and url.startswith("http://127.0.0.1:")
            with urllib.request.urlopen(url, timeout=10) as answer:
                assert b'<canvas id="view"' in answer.read()
            from websockets.sync.client import connect

            page = Page(connect(url.replace("http", "ws") + "live"))
            page.send({"type": "hello", "version": protocol.VERSION})
            assert page.frame()[0].number == 1
            server.send_signal(signal.SIGTERM)
            assert server.wait(15) == 0
            assert server.stderr is not None and "Traceback" not in server.stderr.read()
        finally:
            server.kill()


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--port=99999"], "port"),
        (["--weights=/nowhere", f"--image={ASSETS / 'small_world.png'}", "--prompt=a"], "/nowhere"),
        (["--image=/nowhere.png"], "/nowhere.png"),
        (["--seats=0"], "seats"),
    ],
)
def test_bad_input_is_one_line(words: list[str], reason: str) -> None:
    done = subprocess.run([*COMMAND, *words], cwd=ROOT, capture_output=True, text=True, timeout=60)
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2 and len(lines) == 1 and reason in lines[0], done.stderr
    assert "Traceback" not in done.stderr


def test_an_address_that_cannot_be_had() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        with pytest.raises(InputError, match="choose another --port"):
            bind("127.0.0.1", other.getsockname()[1])
    with pytest.raises(InputError, match=r"cannot serve 203\.0\.113\.1"):
        bind("203.0.113.1", 0)
