"""The live page over a real socket: frames a second, key to picture, transport, first picture.

    python -m benchmarks.live
    python -m benchmarks.live --seconds 60 -- --weights DIR --image room.png --prompt "a room"
    python -m benchmarks.live -- --model_free

Arguments after `--` are those of `python -m sanawm_jax.live`, which is started on a free port.
A key is pressed or released at random moments; `key_to_picture` is the time from the sending of the
message to the arrival of the first picture of the chunk on which the key acts. `transport` is from
the server's sending to the arrival; both ends read the same clock.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from typing import Any

import numpy as np

from sanawm_jax.live import protocol


def main() -> None:
    """Prints the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=40, help="length of the measurement")
    parser.add_argument("--url", help="a server that runs already, ws://HOST:PORT/live")
    parser.add_argument("server", nargs="*", help="arguments of sanawm_jax.live, after --")
    args = parser.parse_args()
    if args.url:
        print(json.dumps(measure(args.url, args.seconds), indent=1))
        return
    command = [sys.executable, "-m", "sanawm_jax.live", "--no_open", "--port", "0", *args.server]
    began = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            line = next((line for line in server.stdout if line.startswith("ready ")), None)
            if line is None:
                sys.exit(server.wait() or 1)
            ready = time.perf_counter() - began
            url = line.split()[1].replace("http", "ws", 1) + "live"
            found = measure(url, args.seconds)
        finally:
            server.send_signal(signal.SIGTERM)
    print(json.dumps({"ready_s": round(ready, 2), **found, "end": server.returncode}, indent=1))


def measure(url: str, seconds: float, seed: int = 0) -> dict[str, Any]:
    """Walks for some seconds; returns the figures."""
    from websockets.sync.client import connect

    rng = random.Random(seed)
    delays, transport, model, times, stages = [], [], [], [], {}
    number, sent = 0, {}
    opened = time.perf_counter()
    with connect(url, compression=None) as page:
        page.send(json.dumps({"type": "hello", "version": protocol.VERSION}))
        first = None
        press_at = end = float("inf")
        while time.perf_counter() < end:
            now = time.perf_counter()
            if now >= press_at:
                number += 1
                keys = rng.choice(["w", "d", "a", "wd"]) if number % 2 else ""
                page.send(json.dumps({"type": "control", "number": number, "keys": keys}))
                sent[number] = now
                press_at = now + rng.uniform(1.0, 2.0)
            try:
                message = page.recv(max(0.0, min(press_at, end, now + 60) - now))
            except TimeoutError:
                continue
            arrived, arrived_ms = time.perf_counter(), 1e3 * time.time()
            if isinstance(message, str):
                about = json.loads(message)
                if about.get("state") == "ended":
                    sys.exit(f"the session has ended: {about['detail']}")
                if about["type"] == "stats":
                    model.append(about["model_ms"])
                elif about["type"] == "welcome":
                    stages = {key: about[key] for key in ("model", "device", "width", "height")}
                continue
            picture, sent_ms, _ = protocol.unpack(message)
            if picture.kind != protocol.FRAME:
                continue
            if first is None:
                first = arrived - opened
                press_at, end = arrived + 2.0, arrived + 2.0 + seconds
            times.append(arrived)
            transport.append(arrived_ms - sent_ms)
            acted = [key for key in sent if key <= picture.input]
            delays.extend(arrived - sent.pop(key) for key in acted)
    steady = [t for t in times if t > times[0] + 1.0]
    gaps = np.diff(steady)
    return {
        **stages,
        "cpus": len(os.sched_getaffinity(0)),
        "load": round(os.getloadavg()[0], 1),
        "first_picture_s": round(first or 0.0, 3),
        "frames_per_s": round((len(steady) - 1) / (steady[-1] - steady[0]), 2),
        "frame_gap_p95_ms": round(1e3 * float(np.percentile(gaps, 95)), 1),
        "key_to_picture_median_s": round(float(np.median(delays)), 3),
        "key_to_picture_p95_s": round(float(np.percentile(delays, 95)), 3),
        "keys": len(delays),
        "transport_p95_ms": round(float(np.percentile(transport, 95)), 2),
        "chunk_median_ms": round(float(np.median(model)), 1),
        "chunk_p95_ms": round(float(np.percentile(model, 95)), 1),
    }


if __name__ == "__main__":
    main()
