"""Who may talk to the server: checks of Host, Origin and token, and headers for the page."""

from __future__ import annotations

import hmac
import ipaddress
import socket
from collections.abc import Iterable
from typing import Any
from urllib.parse import parse_qs

from starlette.datastructures import Headers
from starlette.requests import cookie_parser
from starlette.responses import HTMLResponse, PlainTextResponse, RedirectResponse
from starlette.types import ASGIApp, Receive, Scope, Send

COOKIE = "sanawm_live"
_LOOPBACK = ("127.0.0.1", "localhost", "::1")
# The page evaluates no text. Programs that drive a browser do, to wait for a state of the page.
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self' 'unsafe-eval'; "
    "style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; base-uri 'none'; "
    "form-action 'self'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
_ASK = """<!doctype html><html lang="en"><meta charset="utf-8"><title>Token needed</title>
<body style="font:16px system-ui;margin:4em auto;max-width:30em">
<h1>Token needed</h1><p>The program printed a token when it started.</p>
<form><label>Token <input name="token" autofocus autocomplete="off"></label>
<button>Open</button></form>"""


def is_loopback(host: str) -> bool:
    """Whether an address reaches this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class Guard:
    """An ASGI application around another one, which refuses what is not allowed.

    A page of another site can make a browser send requests here. Its Origin is another one, and
    after DNS rebinding its Host is. A server on loopback therefore takes its own names as Host; on
    another address it takes addresses and the names of this machine, and asks for the token, which
    then is in a cookie.

    Args:
      app: what is protected.
      token: None asks for none.
      names: further names of the server.
    """

    def __init__(self, app: ASGIApp, token: str | None = None, names: Iterable[str] = ()):
        self._app, self._token = app, token
        self._names = {*_LOOPBACK, *(name.lower() for name in names)}
        if token is not None:
            self._names.add(socket.gethostname().lower())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        problem = self._problem(headers)
        if problem is None and not self._has_token(scope, headers):
            if await self._takes_token(scope, receive, send):
                return
            problem = (403, "a token is needed: open the page with ?token=...")
        if problem is None:
            await self._app(scope, receive, _with_headers(send))
        elif scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.close", "code": 1008, "reason": problem[1]})
        elif problem[0] == 403 and scope["method"] == "GET" and scope["path"] == "/":
            await HTMLResponse(_ASK, 403)(scope, receive, send)
        else:
            await PlainTextResponse(problem[1] + "\n", problem[0])(scope, receive, send)

    def _problem(self, headers: Headers) -> tuple[int, str] | None:
        hosts = headers.getlist("host")
        if len(hosts) != 1 or not self._is_ours(_name(hosts[0])):
            return 421, "this name is not the server's; use its address"
        origins = headers.getlist("origin")
        if origins and (len(origins) > 1 or _authority(origins[0]) != hosts[0].lower()):
            return 421, "a page of another site may not use this server"
        return None

    def _is_ours(self, name: str) -> bool:
        if name in self._names:
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return self._token is not None  # an address cannot be rebound

    def _has_token(self, scope: Scope, headers: Headers) -> bool:
        if self._token is None:
            return True
        return self._is_token(cookie_parser(headers.get("cookie", "")).get(COOKIE, ""))

    def _is_token(self, found: str) -> bool:
        assert self._token is not None
        return hmac.compare_digest(found.encode(), self._token.encode())

    async def _takes_token(self, scope: Scope, receive: Receive, send: Send) -> bool:
        """Puts a right token of the address into a cookie."""
        query = parse_qs(scope["query_string"].decode("latin-1"))
        if scope["type"] != "http" or not self._is_token(query.get("token", [""])[0]):
            return False
        answer = RedirectResponse("/", 303)
        answer.set_cookie(COOKIE, self._token or "", httponly=True, samesite="strict")
        await answer(scope, receive, send)
        return True


def _name(host: str) -> str:
    """The name or address in a Host header."""
    host = host.lower()
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.rpartition(":")[0] if host.count(":") == 1 else host


def _authority(origin: str) -> str:
    scheme, _, rest = origin.lower().partition("://")
    return rest if scheme in ("http", "https") else ""


def _with_headers(send: Send) -> Send:
    async def send_more(message: Any) -> None:
        if message["type"] == "http.response.start":
            extra = [(k.lower().encode(), v.encode()) for k, v in _HEADERS.items()]
            message = {**message, "headers": [*message.get("headers", []), *extra]}
        await send(message)

    return send_more
