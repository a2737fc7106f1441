"""The server of the page: routes, limits, and errors as messages."""

from __future__ import annotations

import json
import logging
import secrets
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware

from musigma.explore import heads
from musigma.explore.examples import Choice
from musigma.explore.explorer import Explorer
from musigma.files import finite

__all__ = ["application", "is_local", "serve"]

STATIC = Path(__file__).parent / "static"
LOCAL = ("127.0.0.1", "localhost")

BYTES = 20_000_000
"""Largest size of an upload."""

OPENING = 2.0
"""Seconds in which the first page may be opened before the data are surveyed."""

HEADERS = {
    "Content-Security-Policy": "default-src 'self'; frame-ancestors 'none'; base-uri 'none'",
    "Referrer-Policy": "no-referrer",  # the address may hold the token
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
}

Next = Callable[[Request], Awaitable[Response]]


def application(explorer: Explorer, token: str = "", local: bool = True) -> FastAPI:
    """The page and its answers, as an ASGI application.

    Args:
        explorer: What is shown.
        token: The first part of every path, without which nothing is served; empty for none.
        local: Whether to answer only requests to a name of this machine. It keeps pages of other
            sites, whose name may lead here, from reading the answers.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        explorer.survey.start()
        yield
        await run_in_threadpool(explorer.survey.stop)

    outer = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    inner = FastAPI(docs_url=None, redoc_url=None, openapi_url=None) if token else outer
    _add_answers(inner, explorer)
    inner.mount("/", StaticFiles(directory=STATIC, html=True))
    if token:
        outer.mount(f"/{token}", inner)
    for app in {id(outer): outer, id(inner): inner}.values():
        _add_errors(app)

    @outer.middleware("http")
    async def guarded(request: Request, call_next: Next) -> Response:
        try:
            response = await call_next(request)
        except Exception as error:  # a route that is not ours, or a client that left
            response = _refused(error)
        for name, value in HEADERS.items():
            response.headers[name] = value
        return response

    if local:
        outer.add_middleware(TrustedHostMiddleware, allowed_hosts=list(LOCAL))
    return outer


def _refused(error: Exception) -> JSONResponse:
    """An error as a message; what is not the user's to repair is also logged."""
    expected = isinstance(error, (ValueError, TypeError, OSError))
    text = str(error) if expected else f"{type(error).__name__}: {error}"
    if not expected:
        logging.getLogger("musigma").warning("a request failed", exc_info=error)
    return JSONResponse({"message": text[:2000] or type(error).__name__}, 400)


def _add_errors(app: FastAPI) -> None:
    """Answer every error with a message, none of them with a status of 500 or more."""

    async def http(_: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return JSONResponse({"message": error.detail}, min(error.status_code, 499))

    async def invalid(_: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        faults = [f"{e['loc'][-1]}: {e['msg'].lower()}" for e in error.errors()]
        return JSONResponse({"message": "; ".join(faults)}, 422)

    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(RequestValidationError, invalid)


def _add_answers(app: FastAPI, explorer: Explorer) -> None:
    """The routes. Those that are not async run in threads, one at a time while they use models."""

    def answer(ask: Callable[[], dict[str, Any]]) -> Response:
        try:
            return JSONResponse(finite({**ask(), "notice": explorer.notice()}))
        except Exception as error:  # models and readers raise anything
            return _refused(error)

    def choice(index: int, upload: str, label: int) -> Choice:
        return Choice(index, upload, None if label < 0 else label)

    @app.get("/api/about")
    def about() -> Response:
        return answer(explorer.about)

    @app.get("/api/one")
    def one(
        index: int = 0,
        upload: str = "",
        label: int = -1,
        seed: int = 0,
        count: int = 8,
        temperature: float = 1.0,
        set: str = "",
    ) -> Response:
        of = choice(index, upload, label)
        return answer(lambda: explorer.one(of, _seed(seed), count, temperature, set))

    @app.get("/api/decode")
    def decode(
        index: int = 0,
        upload: str = "",
        label: int = -1,
        start: str = "example",
        set: str = "",
        along: int | None = None,
        move: str = "",
    ) -> Response:
        of = choice(index, upload, label)
        return answer(lambda: explorer.decode(of, start, set, along, move))

    @app.get("/api/columns")
    def columns(index: int = 0, upload: str = "", label: int = -1) -> Response:
        return answer(lambda: explorer.conditionals(choice(index, upload, label)))

    @app.get("/api/plane")
    def plane(index: int = 0, label: int = -1) -> Response:
        return answer(lambda: explorer.plane(choice(index, "", label)))

    @app.get("/api/anomalies")
    def anomalies(rate: float = 0.01, first: int = 0, count: int = 24) -> Response:
        return answer(lambda: explorer.anomalies(rate, first, count))

    @app.get("/api/order")
    def order() -> Response:
        return answer(explorer.order)

    @app.get("/api/map")
    def map_(axes: str = "components", color: str = "", first: int = 0) -> Response:
        return answer(lambda: explorer.map(axes, color, first))

    @app.get("/api/hover")
    def hover(
        index: int = 0, upload: str = "", label: int = -1, axes: str = "components"
    ) -> Response:
        return answer(lambda: explorer.hover(choice(index, upload, label), axes))

    @app.get("/api/at")
    def at(places: str, index: int = 0, label: int = -1, axes: str = "components") -> Response:
        return answer(lambda: explorer.at(choice(index, "", label), axes, _pairs(places)))

    @app.get("/api/levels")
    def levels(
        index: int = 0,
        upload: str = "",
        label: int = -1,
        level: int = 0,
        seed: int = 0,
        count: int = 6,
        temperature: float = 1.0,
    ) -> Response:
        of = choice(index, upload, label)
        return answer(lambda: explorer.levels(of, level, _seed(seed), count, temperature))

    @app.get("/api/head")
    def head(format: str, numbers: str) -> Response:
        return answer(lambda: heads.head(format, _numbers(numbers)))

    @app.get("/api/mismatch")
    def mismatch(sampler: str, kl: str, noise: float = 1.0) -> Response:
        return answer(lambda: heads.mismatch(sampler, kl, noise))

    @app.get("/api/training")
    def training() -> Response:
        return answer(explorer.progress)

    @app.post("/api/upload", openapi_extra=_body("application/octet-stream", type="string"))
    async def upload(request: Request, name: str = "") -> Response:
        content = await _content(request)
        keep = explorer.examples.picture
        return await run_in_threadpool(answer, lambda: keep(content, name[:200]))

    @app.post("/api/row", openapi_extra=_body("application/json", type="array"))
    async def row(request: Request) -> Response:
        content = await _content(request)
        keep = explorer.examples.row
        return await run_in_threadpool(answer, lambda: keep(_cells(content)))


def _body(media: str, **schema: str) -> dict[str, Any]:
    """The body of a request, which `_content` reads, in the schema of the server."""
    return {"requestBody": {"content": {media: {"schema": schema}}, "required": True}}


async def _content(request: Request) -> bytes:
    """The body of a request; one that is too large is not read to its end.

    Raises:
        HTTPException: If it is empty or too large, or the page of another site sent it.
    """
    origin = request.headers.get("origin", "")
    if origin and origin.partition("://")[2] != request.headers.get("host"):
        raise HTTPException(403, f"upload: it comes from another site, {origin[:100]}")
    content = bytearray()
    async for part in request.stream():
        content += part
        if len(content) > BYTES:
            text = f"upload: it has more than {BYTES:,} bytes; give a smaller file"
            raise HTTPException(413, text)
    if not content:
        raise HTTPException(400, "upload: the file is empty")
    return bytes(content)


def _cells(content: bytes) -> list[str]:
    try:
        cells = json.loads(content)
    except (ValueError, RecursionError):
        cells = None
    if not isinstance(cells, list) or not all(isinstance(cell, str) for cell in cells):
        raise ValueError("row: expected a JSON list of texts, one for each column")
    return cells


def _numbers(text: str) -> list[float]:
    try:
        return [float(word) for word in text.split(",")]
    except ValueError:
        raise ValueError(f"expected numbers such as 0.5,-1; got {text[:40]!r}") from None


def _pairs(text: str) -> list[list[float]]:
    return [_numbers(pair) for pair in text.split(";")]


def _seed(seed: int) -> int:
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed: expected 0 to 2^63 - 1; got {seed}")
    return seed


# --- running -------------------------------------------------------------------------------------


def is_local(host: str) -> bool:
    """Whether a host can be reached from this machine only."""
    return host in LOCAL


def serve(explorer: Explorer, host: str, port: int, announce: Callable[[str], None]) -> None:
    """Serve the page until Ctrl-C.

    Args:
        explorer: What is shown.
        host: Name or address to listen on. If others can reach it, the address of the page holds
            a random token.
        port: The port; 0 for any that is free.
        announce: Called with the address once it can be opened.

    Raises:
        ValueError: If the address cannot be listened on.
    """
    local = is_local(host)
    token = "" if local else secrets.token_urlsafe(16)
    listening = _listening(host, port)
    port = listening.getsockname()[1]
    name = f"[{host}]" if ":" in host else host
    announce(f"http://{name}:{port}/{token}{'/' if token else ''}")
    app = application(explorer, token, local)
    explorer.turns.rest(OPENING)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False))
    with listening:
        server.run(sockets=[listening])


def _listening(host: str, port: int) -> socket.socket:
    """A socket that takes connections.

    Raises:
        ValueError: If the address cannot be listened on.
    """
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        made = socket.socket(family, kind, protocol)
        try:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            made.bind(place)
            made.listen(128)
        except BaseException:
            made.close()
            raise
    except (OSError, OverflowError) as error:
        raise ValueError(
            f"host, port: cannot listen on {host}:{port} ({error}); give another --port, 0 for "
            "any that is free"
        ) from error
    return made
