"""What every request passes first: which addresses there are, from where, how large, for whom."""

from __future__ import annotations

import json
import os
import re
import secrets
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from webui.auth import client_address

MEGABYTE = 2**20
BODY_LIMIT = 4 * MEGABYTE
"""Bytes of a request that is no upload."""

UPLOAD_REQUEST_LIMIT = 1024 * MEGABYTE
"""Bytes of one request with uploads; ``serve.UPLOAD_LIMIT`` is for each file."""

API = "/gradio_api"

# Gradio has many more: a proxy, a fetcher of other sites' files, a recorder, deep links, run
# history. None of them is needed, and some of them reach out of this machine.
_GET = re.compile(
    rf"/|/login|/logout|/config/?|/theme\.css|/manifest\.json|/favicon\.ico|/robots\.txt"
    rf"|/(?:assets|static|svelte)/.+"
    rf"|{API}/(?:info|user|login_check|app_id|startup-events|theme\.css|openapi\.json)/?"
    rf"|{API}/(?:queue/data|queue/status|upload_progress)"
    rf"|{API}/heartbeat/[^/]+|{API}/call/[^/]+/[^/]+|{API}/file=.+"
)
_POST = re.compile(
    rf"/login/?|{API}/(?:queue/join|cancel|reset/?|upload|(?:run|api|call|call/v2)/[^/]+/?)"
)
_CACHED = re.compile(r"[0-9a-f]{64}/(?!\.\.?$)[^/\\\x00]+")
_BEFORE_LOGIN = re.compile(rf"{API}/(?:user|login_check|startup-events|theme\.css)/?")
_HEARTBEAT = re.compile(rf"{API}/heartbeat/([^/]+)")

LOOPBACK_HOSTS = frozenset({"127.0.0.1", "localhost", "::1"})


class Refused(Exception):
    """A request that is answered with a status and a sentence in place of what it asks for."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status
        self.text = text


@dataclass
class Gate:
    """ASGI middleware in front of the Gradio app.

    Attributes:
        app: what comes next.
        uploads: folder of Gradio's cache; the only files that are served lie in it.
        user_of: who a request's cookies belong to; None where there are no logins. Without logins
            only names of this machine are taken as Host.
    """

    app: ASGIApp
    uploads: Path
    user_of: Callable[[dict[str, str]], str | None] | None = None
    _sessions: OrderedDict[str, str | None] = field(default_factory=OrderedDict)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check the request, hand it on, and add headers to the answer."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            return
        client_address.set((scope.get("client") or ("",))[0])
        nonce = secrets.token_urlsafe(16)
        answer = _Answer(send, nonce)
        try:
            receive = await self._checked(scope, receive)
            await self.app(scope, receive, answer.send)
        except Refused as refused:
            if answer.started:
                raise
            response = PlainTextResponse(refused.text, status_code=refused.status)
            await response(scope, receive, answer.send)

    async def _checked(self, scope: Scope, receive: Receive) -> Receive:
        headers = Headers(scope=scope)
        path: str = scope["path"]
        method = scope["method"]
        self._check_source(headers)
        allowed = _POST if method == "POST" else _GET if method in ("GET", "HEAD") else None
        if allowed is None or not allowed.fullmatch(path):
            raise Refused(404, "Not found.")
        user = None if self.user_of is None else self.user_of(_cookies(headers))
        if self.user_of is not None and user is None and path.startswith(API):
            if not _BEFORE_LOGIN.fullmatch(path):
                raise Refused(401, "Log in first.")
        if path.startswith(f"{API}/file="):
            if not self._is_cached(path.removeprefix(f"{API}/file=")):
                raise Refused(404, "Not found.")
        sessions = parse_qs(scope["query_string"].decode("latin-1")).get("session_hash", [])
        if found := _HEARTBEAT.fullmatch(path):
            sessions.append(found[1])
        if method == "POST" and path == f"{API}/upload":
            receive = _limited(receive, headers, UPLOAD_REQUEST_LIMIT)
        elif method == "POST":
            body = await _read(_limited(receive, headers, BODY_LIMIT))
            if path.startswith(API):
                sessions += self._check_json(body)
            receive = _replay(body, receive)
        if self.user_of is not None:
            for session in sessions:
                self._check_session(session, user)
        return receive

    def _check_source(self, headers: Headers) -> None:
        """Refuse what other sites send through somebody's browser, and names that lead here."""
        host = headers.get("host", "")
        if self.user_of is None and _host_name(host) not in LOOPBACK_HOSTS:
            raise Refused(
                421, "This app answers to 127.0.0.1 and localhost only; start it with --listen."
            )
        origin = headers.get("origin")
        if origin is not None:
            # Behind a proxy or tunnel Host may be rewritten; a page elsewhere cannot set the other.
            hosts = {host.lower(), headers.get("x-forwarded-host", host).lower()}
            if urlsplit(origin).netloc.lower() not in hosts:
                raise Refused(403, "Requests from other sites are not answered.")

    def _is_cached(self, path: str) -> bool:
        """Whether a path leads into Gradio's cache, where the name of each folder is a checksum."""
        within = path.removeprefix(f"{self.uploads}{os.sep}")
        return within != path and _CACHED.fullmatch(within.replace(os.sep, "/")) is not None

    def _check_json(self, body: bytes) -> list[str]:
        """The sessions that a request names.

        Raises:
            Refused: when it is not JSON of an object, or names a file that was not uploaded. Gradio
                would fetch an address, and show any file of the working and temporary folders.
        """
        try:
            data = json.loads(body or b"{}")
        except (ValueError, RecursionError):
            data = None
        if not isinstance(data, dict):
            raise Refused(400, "The request is not a JSON object.")
        for item in _objects(data):
            path = item.get("path")
            if "meta" in item and isinstance(path, str) and not self._is_cached(path):
                raise Refused(400, "A file was not uploaded to this app; upload it first.")
        session = data.get("session_hash")
        return [session] if isinstance(session, str) else []

    def _check_session(self, session: str, user: str | None) -> None:
        """Tie a session, whose messages hold results, to whoever used it first."""
        if self._sessions.setdefault(session, user) != user:
            raise Refused(404, "Not found.")
        self._sessions.move_to_end(session)
        if len(self._sessions) > 100_000:
            self._sessions.popitem(last=False)


class _Answer:
    """Adds security headers to an answer, and the nonce to the scripts of a page."""

    def __init__(self, send: Send, nonce: str) -> None:
        self._send = send
        self._nonce = nonce
        self._page: Message | None = None
        self._parts: list[bytes] = []
        self.started = False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.started = True
            headers = MutableHeaders(scope=message)
            headers.update(_security_headers(self._nonce))
            if headers.get("content-type", "").startswith("text/html"):
                headers["Cache-Control"] = "no-store"
                self._page = message
                return
        elif self._page is not None:
            self._parts.append(message.get("body", b""))
            if message.get("more_body"):
                return
            # The page's own data holds no "<": Gradio writes it as \u003c.
            page = b"".join(self._parts)
            page = page.replace(b"<script", f'<script nonce="{self._nonce}"'.encode())
            if "content-length" in (headers := MutableHeaders(scope=self._page)):
                headers["content-length"] = str(len(page))
            await self._send(self._page)
            self._page = None
            message = {**message, "body": page}
        await self._send(message)


def _security_headers(nonce: str) -> dict[str, str]:
    policy = {
        "default-src": "'none'",
        # Gradio makes functions of the templates that its components come with. What a name or file
        # could bring in, scripts and handlers in the page, stays forbidden.
        "script-src": f"'self' 'nonce-{nonce}' 'unsafe-eval'",
        "style-src": "'self' 'unsafe-inline'",  # Gradio and Svelte set styles in elements
        "img-src": "'self' data: blob:",
        "media-src": "'self' data: blob:",
        "font-src": "'self' data:",
        "connect-src": "'self' data: blob:",
        "worker-src": "'self' blob:",
        "manifest-src": "'self'",
        "form-action": "'self'",
        "base-uri": "'self'",
        "frame-ancestors": "'none'",
    }
    return {
        "Content-Security-Policy": "; ".join(f"{key} {value}" for key, value in policy.items()),
        "X-Content-Type-Options": "nosniff",
        "X-Frame-Options": "DENY",
        "Referrer-Policy": "no-referrer",
        "Cross-Origin-Resource-Policy": "same-origin",
        "Cross-Origin-Opener-Policy": "same-origin",
        "Permissions-Policy": "camera=(), microphone=(), geolocation=()",
    }


def _host_name(host: str) -> str:
    try:
        return (urlsplit(f"//{host}").hostname or "").lower()
    except ValueError:
        return ""


def _cookies(headers: Headers) -> dict[str, str]:
    pairs = (part.split("=", 1) for part in headers.get("cookie", "").split(";") if "=" in part)
    return {name.strip(): value.strip() for name, value in pairs}


def _limited(receive: Receive, headers: Headers, limit: int) -> Receive:
    refused = Refused(
        413, f"The request is too large; at most {limit // MEGABYTE} MB are taken at once."
    )
    declared = headers.get("content-length", "0")
    if not declared.isdecimal() or int(declared) > limit:
        raise refused
    taken = 0

    async def count() -> Message:
        nonlocal taken
        message = await receive()
        taken += len(message.get("body", b""))
        if taken > limit:
            raise refused
        return message

    return count


async def _read(receive: Receive) -> bytes:
    parts: list[bytes] = []
    while True:
        message = await receive()
        if message["type"] != "http.request":
            raise Refused(400, "The request ended too early.")
        parts.append(message.get("body", b""))
        if not message.get("more_body"):
            return b"".join(parts)


def _replay(body: bytes, receive: Receive) -> Receive:
    messages: Iterator[Message] = iter([{"type": "http.request", "body": body}])

    async def replay() -> Message:
        return next(messages, None) or await receive()

    return replay


def _objects(data: Any) -> Iterator[dict[str, Any]]:
    waiting = [data]
    while waiting:
        item = waiting.pop()
        if isinstance(item, dict):
            yield item
            waiting.extend(item.values())
        elif isinstance(item, list):
            waiting.extend(item)
