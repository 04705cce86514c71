"""Serves the live world.

    python -m sanawm_jax.live
    python -m sanawm_jax.live --weights DIR --refiner_weights DIR --image room.png --prompt "a room"
    python -m sanawm_jax.live --model_free --port 8765 --no_open

The flags are those of `sample.py` and the ones below. The line `ready http://127.0.0.1:8765/` says
that the first picture can be asked for. Ctrl-C or SIGTERM ends the server.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import secrets
import signal
import socket
import sys
import threading
import webbrowser
from collections.abc import Iterator
from typing import Any

from absl import app, flags

from sanawm_jax.runtime.command_line import end_with, fail, lasting_imports, show_notes
from sanawm_jax.runtime.errors import InputError
from sanawm_jax.runtime.shipped import SMALL_WORLD_REFINER
from sanawm_jax.sampling.cli import define_options, read_options

_PACKAGES = "the live page needs starlette and uvicorn: pip install 'sanawm-jax[live]'"


def main() -> None:
    """Runs the program with the arguments of the process."""
    flags.DEFINE_string("host", "127.0.0.1", "address to serve; another machine needs a token")
    flags.DEFINE_integer("port", 8765, "port to serve; 0 takes a free one", 0, 65535)
    flags.DEFINE_string("token", None, "asked for where --host is not loopback; None draws one")
    flags.DEFINE_multi_string("allow_host", [], "further names of this machine that pages may use")
    flags.DEFINE_bool("no_open", False, "do not open a browser")
    flags.DEFINE_bool("model_free", False, "draw frames from the camera's pose, without weights")
    flags.DEFINE_integer("seats", 1, "visitors who walk at the same time; others wait", 1, 16)
    flags.DEFINE_integer("timeline_mib", 512, "memory of each visitor's timeline", 16)
    argv = define_options(sys.argv, is_streaming=True)
    app.run(_run, argv=argv, flags_parser=_read)


def _read(argv: list[str]) -> Any:
    """The options; the shipped refiner takes blocks of three chunks, so it must be asked for."""
    options = read_options(argv)
    if flags.FLAGS.refiner_weights is None and options.refiner_weights == SMALL_WORLD_REFINER:
        options = dataclasses.replace(options, refiner_weights=None)
    return options


def _run(options: Any) -> None:
    show_notes()
    values = flags.FLAGS
    try:
        with lasting_imports():
            try:
                import uvicorn  # noqa: F401

                from sanawm_jax.live.security import is_loopback
            except ImportError:
                raise InputError(_PACKAGES) from None
            from sanawm_jax.runtime.compilation_cache import use_compilation_cache
            from sanawm_jax.runtime.compiler_flags import use_compiler_flags

            if values.model_free:
                from sanawm_jax.live.model_free import ModelFreeEngine

                engine: Any = ModelFreeEngine()
            else:
                from sanawm_jax.live.model import ModelEngine

                engine = ModelEngine(options)
        use_compiler_flags()
        use_compilation_cache()
        token = None
        if not is_loopback(values.host):
            token = values.token or secrets.token_urlsafe(16)
        bound = bind(values.host, values.port)
        asyncio.run(_serve(engine, options, bound, token))
    except InputError as error:
        fail(str(error))
    except (Exception, KeyboardInterrupt) as error:
        end_with(error)
    sys.stdout.flush()
    os._exit(0)  # a thread that still compiles would hold the process


def bind(host: str, port: int) -> socket.socket:
    """A socket at an address; raises `InputError` if it cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(f"cannot serve {host}:{port}: {reason}; choose another --port") from None
    return bound


async def _serve(engine: Any, options: Any, bound: socket.socket, token: str | None) -> None:
    import uvicorn

    from sanawm_jax.live.lobby import Lobby
    from sanawm_jax.live.security import Guard
    from sanawm_jax.live.server import Live, configured

    values = flags.FLAGS
    host, port = bound.getsockname()[:2]
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}/"
    lobby = Lobby(engine, values.seats, values.timeline_mib << 20)
    app = Guard(Live(lobby, options.seed).app(), token, values.allow_host)
    server = uvicorn.Server(configured(app))
    _until_signalled(server)
    loop, failures = asyncio.get_running_loop(), []

    def load() -> None:
        try:
            engine.load(lambda stage: loop.call_soon_threadsafe(lobby.set_stage, stage))
            loop.call_soon_threadsafe(ready)
        except BaseException as error:
            failures.append(error)
            server.should_exit = True

    def ready() -> None:
        lobby.set_stage(None)
        secret = f"?token={token}" if token else ""
        if token:
            print(f"token {token}", flush=True)
        print(f"ready {url}", flush=True)
        if not values.no_open:
            webbrowser.open(url + secret)

    print(f"loading; the page is {url}", file=sys.stderr, flush=True)
    threading.Thread(target=load, name="loading", daemon=True).start()
    await server.serve(sockets=[bound])
    if failures:
        raise failures[0]


def _until_signalled(server: Any) -> None:
    """Ends a uvicorn server with status 0 after a signal, which it would otherwise raise again."""

    @contextlib.contextmanager
    def capture() -> Iterator[None]:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, server.handle_exit, number, None)
        yield

    server.capture_signals = capture


if __name__ == "__main__":
    main()
