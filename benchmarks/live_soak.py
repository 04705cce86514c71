"""Visitors that come, walk, stall and vanish, for as long as one likes: no leak, no dead session.

    python -m benchmarks.live_soak --minutes 20
    python -m benchmarks.live_soak --minutes 20 -- --weights DIR --image room.png --prompt "a room"

Starts `python -m sanawm_jax.live` (without arguments after `--`, its model-free drawing). Several
clients at a time behave badly in turns; at the end all of them leave, and one more visitor must get
pictures. Prints JSON: what the clients did, and the server's memory and threads over time.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from sanawm_jax.live import protocol

CLIENTS = 6


def main() -> None:
    """Prints the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("server", nargs="*", help="arguments of sanawm_jax.live, after --")
    args = parser.parse_args()
    words = args.server or ["--model_free", "--timeline_mib", "16", "--seats", "2"]
    command = [sys.executable, "-m", "sanawm_jax.live", "--no_open", "--port", "0", *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            line = next(line for line in server.stdout if line.startswith("ready "))
            url = line.split()[1].replace("http", "ws", 1) + "live"
            found = soak(url, server.pid, 60 * args.minutes)
            found["is_alive"] = server.poll() is None
        finally:
            server.send_signal(signal.SIGTERM)
    print(json.dumps({**found, "end": server.returncode}, indent=1))


def soak(url: str, pid: int, seconds: float) -> dict[str, Any]:
    """Runs the clients; returns what they did and how the server fared."""
    done: collections.Counter[str] = collections.Counter()
    end = time.monotonic() + seconds
    threads = [
        threading.Thread(target=_client, args=(url, i, end, done), daemon=True)
        for i in range(CLIENTS)
    ]
    before = _figures(pid)
    for thread in threads:
        thread.start()
    history = []
    while time.monotonic() < end:
        time.sleep(min(60, seconds / 10))
        history.append(_figures(pid))
        print(json.dumps(history[-1]), file=sys.stderr, flush=True)
    for thread in threads:
        thread.join(60)
    time.sleep(25)  # longer than a session waits for its page
    after = _figures(pid)
    seen = _walk(url, random.Random(0), 8.0)
    return {
        "minutes": round(seconds / 60, 1),
        "clients": dict(done),
        "before": before,
        "while": history,
        "after": after,
        "last_visitor_frames": seen,
    }


def _figures(pid: int) -> dict[str, float]:
    status = Path(f"/proc/{pid}/status").read_text()
    fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    files = len(list(Path(f"/proc/{pid}/fd").iterdir()))
    memory = int(fields["VmRSS"].split()[0]) / 1024
    return {"mib": round(memory, 1), "threads": int(fields["Threads"]), "files": files}


def _client(url: str, number: int, end: float, done: collections.Counter[str]) -> None:
    rng = random.Random(number)
    behaviours = [_walk, _walk, _vanish, _stall, _shout, _damage]
    while time.monotonic() < end:
        behave = rng.choice(behaviours)
        try:
            frames = behave(url, rng, rng.uniform(1, 12))
            done["frames"] += frames
        except Exception as error:
            done[type(error).__name__] += 1
        done[behave.__name__.strip("_")] += 1


@contextlib.contextmanager
def _page(url: str, **more: Any) -> Any:
    from websockets.sync.client import connect

    with connect(url, compression=None, close_timeout=2, **more) as page:
        page.send(json.dumps({"type": "hello", "version": protocol.VERSION}))
        yield page


def _walk(url: str, rng: random.Random, seconds: float) -> int:
    """Walks, goes back, changes the words; returns the frames it saw."""
    frames, number, end, press_at = 0, 0, time.monotonic() + seconds, 0.0
    with _page(url) as page:
        while time.monotonic() < end:
            if time.monotonic() > press_at:  # by the clock: after going back, only a key walks on
                number, press_at = number + 1, time.monotonic() + 0.5
                keys = rng.choice(["w", "d", "wd"])
                page.send(json.dumps({"type": "control", "number": number, "keys": keys}))
            try:
                message = page.recv(0.5)
            except TimeoutError:
                continue
            if isinstance(message, str):
                if rng.random() < 0.05:
                    page.send(json.dumps({"type": "go", "node": rng.randrange(5)}))
                if rng.random() < 0.05:
                    page.send(json.dumps({"type": "prompt", "text": f"a sky of {number}"}))
            else:
                frames += message[0] == protocol.FRAME
    return frames


def _vanish(url: str, rng: random.Random, seconds: float) -> int:
    """Goes without a word: the connection is reset."""
    with _page(url) as page:
        page.recv(10)
        linger = b"\x01\0\0\0\0\0\0\0"
        page.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        page.socket.close()
    return 0


def _stall(url: str, rng: random.Random, seconds: float) -> int:
    """Stops reading."""
    with _page(url, max_queue=1) as page:
        time.sleep(seconds)
        page.socket.close()
    return 0


def _shout(url: str, rng: random.Random, seconds: float) -> int:
    """Sends more than is allowed."""
    with _page(url) as page:
        for number in range(1000):
            page.send(json.dumps({"type": "control", "number": number}))
    return 0


def _damage(url: str, rng: random.Random, seconds: float) -> int:
    """Sends what is no message."""
    with _page(url) as page:
        page.send("".join(chr(rng.randrange(32, 1000)) for _ in range(rng.randrange(5000))))
        page.recv(10)
    return 0


if __name__ == "__main__":
    main()
