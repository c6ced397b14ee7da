"""The door: an ASGI layer before the application that takes a request whole, or refuses it.

It stands in Ray Serve's proxy (`RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH`, see `proxy_middlewares`), so that slow
clients, oversized bodies and strangers never reach a replica; and again in the application, for servers that do not
have it there. Since it holds the whole request, one whose replica died before it answered is sent to another: a
classification changes nothing, so doing it twice does no harm.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import os
from dataclasses import asdict, dataclass
from typing import Any

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from runtime.serving.problems import RequestProblem
from runtime.serving.settings import Limits, settings_from

KEY_VARIABLE = "MASS_API_KEY"
LIMITS_VARIABLE = "MASS_SERVE_LIMITS"
SERVED_BY = b"x-mass-bundle"  # a header of every response of the application
OPEN_PATHS = frozenset({"/", "/healthz", "/readyz", "/v2/health/live", "/v2/health/ready", "/favicon.ico"})
ATTEMPTS = 3
PAUSE_S = 0.2
HELD_REQUESTS = 16  # of the largest size, together


class Gate:
    """An ASGI application around another."""

    def __init__(
        self, app: ASGIApp, limits: Limits, api_key: str | None = None, *, proxy: bool = False
    ) -> None:
        """Wrap.

        Args:
            app: what is protected.
            limits: of requests.
            api_key: asked of clients, except for `OPEN_PATHS`; None asks for none.
            proxy: `app` is Ray Serve's proxy: its own errors become problems that may be tried again.
        """
        self._app = app
        self._limits = limits
        self._key = api_key.encode() if api_key else None
        self._proxy = proxy
        self._held = 0  # bytes of all requests that are being taken or answered

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on when it is whole and welcome."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return
        taken = _Taken()
        try:
            self._check(scope)
            body = await self._body(scope, receive, taken)
            if body is not None:
                await self._pass_on(scope, body, receive, send)
        except RequestProblem as problem:
            await send_problem(problem, send)
        finally:
            self._held -= taken.held

    def _check(self, scope: Scope) -> None:
        if self._key is None or scope["path"] in OPEN_PATHS:
            return
        headers = dict(scope["headers"])
        given = headers.get(b"x-api-key") or headers.get(b"authorization", b"").removeprefix(b"Bearer ")
        if not hmac.compare_digest(given, self._key):
            raise RequestProblem(401, "this server asks for a key: send it as `Authorization: Bearer KEY`.")

    def _hold(self, count: int, taken: _Taken) -> None:
        """Account for memory; many large requests at once must not fill it."""
        if self._held + count > HELD_REQUESTS * self._limits.max_body_bytes:
            raise RequestProblem(503, "too many large requests at once; try again.")
        self._held += count
        taken.held += count

    async def _body(self, scope: Scope, receive: Receive, taken: _Taken) -> bytes | None:
        """The whole body; None if the client went away."""
        most = self._limits.max_body_bytes
        announced = dict(scope["headers"]).get(b"content-length", b"0")
        size, chunks, more = 0, [], True
        try:
            async with asyncio.timeout(self._limits.body_timeout):
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    chunk = message.get("body", b"")
                    more, size = message.get("more_body", False), size + len(chunk)
                    if size <= most:
                        self._hold(len(chunk), taken)
                        chunks.append(chunk)
                    elif size > 2 * most:
                        break  # a little is read to its end, so that the client is there to read the answer
        except TimeoutError as error:
            raise RequestProblem(
                408, f"the request was not sent within {self._limits.body_timeout:g} s; send it faster."
            ) from error
        if size > most or (announced.isdigit() and int(announced) > most):
            raise RequestProblem(
                413, f"body: larger than {self._limits.max_body_mib:g} MiB; send fewer images."
            )
        return chunks[0] if len(chunks) == 1 else b"".join(chunks)

    async def _pass_on(self, scope: Scope, body: bytes, receive: Receive, send: Send) -> None:
        for attempt in range(ATTEMPTS if self._proxy else 1):
            answer = _Answer(send, translate=self._proxy and scope["path"] not in ("/-/healthz", "/-/routes"))
            # A proxy changes the scope; another attempt needs it as it was.
            await self._app(dict(scope) if self._proxy else scope, _replayed(body, receive), answer)
            if answer.started or not self._proxy:
                return
            if answer.final:
                await send_problem(answer.final, send)
                return
            if attempt + 1 < ATTEMPTS:
                await asyncio.sleep(PAUSE_S * (attempt + 1))  # the proxy learns of the death meanwhile
        raise RequestProblem(503, "the replica failed before it answered; try again.")


@dataclass
class _Taken:
    """Bytes that one request holds."""

    held: int = 0


class _Answer:
    """Where the inner application sends its response; the proxy's own errors are held back."""

    def __init__(self, send: Send, *, translate: bool) -> None:
        self.started = False
        self.final: RequestProblem | None = None
        self._send = send
        self._translate = translate

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start" and self._translate:
            headers = dict(message["headers"])
            if SERVED_BY not in headers:
                self.final = _problem_from_proxy(message["status"])
        if self.final is None:
            self.started = True
            await self._send(message)


def _problem_from_proxy(status: int) -> RequestProblem | None:
    """What Ray's own answer means to a client; None lets it pass."""
    told = {
        404: (503, "the model is not being served: it is starting or stopping; try again."),
        408: (504, "no replica answered in time; try again."),
        429: (429, "too many requests are waiting; try again."),
        500: (503, "the replica failed; try again."),
        503: (503, "no replica is available; try again."),
    }
    return RequestProblem(*told[status]) if status in told else None


def _replayed(body: bytes, receive: Receive) -> Receive:
    """The body in one message, then whatever the client does."""
    sent = False

    async def receive_again() -> Message:
        nonlocal sent
        if sent:
            return await receive()
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return receive_again


async def send_problem(problem: RequestProblem, send: Send) -> None:
    """Answer with a problem."""
    body = problem.body()
    headers = [(name.encode(), value.encode()) for name, value in problem.headers().items()]
    headers.append((b"content-length", str(len(body)).encode()))
    await send({"type": "http.response.start", "status": problem.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def limits_to_environment(limits: Limits) -> str:
    """For `LIMITS_VARIABLE`."""
    return json.dumps({name: value for name, value in asdict(limits).items() if name in _LIMIT_NAMES})


def proxy_middlewares() -> list[Middleware]:
    """What Ray Serve's proxies put before the application; settings come from the environment."""
    limits = settings_from(Limits, json.loads(os.environ.get(LIMITS_VARIABLE, "{}")))
    options: dict[str, Any] = {"limits": limits, "api_key": os.environ.get(KEY_VARIABLE), "proxy": True}
    return [Middleware(Gate, **options)]


_LIMIT_NAMES = frozenset(asdict(Limits()))
