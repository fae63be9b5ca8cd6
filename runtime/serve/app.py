"""The web application: every route, behind one door.

/                          a page that shows the server at work
/metrics, /v1/stats        the same for Prometheus, and as JSON
/v1/models                 what is served
/v1/models/{name}/stream   WebSocket; see `frames`
/v2/...                    Open Inference Protocol; see `infer`
"""

from __future__ import annotations

import importlib.resources
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route, WebSocketRoute

from ..errors import OfframpError
from ..manifest import Manifest
from .body import RefusedError
from .door import Door
from .infer import Infer, error_response
from .limits import Settings
from .metrics import Metrics
from .stream import Streams
from .work import Engine, Host, SegmentState, held

PAGE = "page.html"
# The page brings its own style and script, and may talk to its own server only.
_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def app(engine: Engine, host: Host, observer: Metrics, settings: Settings) -> Starlette:
    """The application; `state.streams` and `state.infer` are for whoever stops the server."""
    observer.watch(host, engine)
    streams = Streams(engine, host, observer, settings)
    infer = Infer(engine, host, observer, settings)
    site = _Site(host, observer, asks=settings.token is not None)
    made = Starlette(
        routes=[
            Route("/", site.page),
            Route("/metrics", site.metrics),
            Route("/v1/stats", site.stats),
            Route("/v1/models", site.models),
            WebSocketRoute("/v1/models/{name}/stream", streams.endpoint),
            *infer.routes(),
        ],
        middleware=[Middleware(Door, settings=settings)],
        exception_handlers={
            OfframpError: _offramp_error,
            RefusedError: _refused,
            HTTPException: _http_error,
            Exception: _bug,
        },
    )
    made.state.streams, made.state.infer = streams, infer
    return made


class _Site:
    """What is to be looked at."""

    def __init__(self, host: Host, observer: Metrics, *, asks: bool) -> None:
        self._host, self._observer = host, observer
        page = importlib.resources.files(__package__).joinpath(PAGE).read_text("utf-8")
        # A page that knows asks for the token at once, and not after a refusal.
        self._page = page.replace('data-asks="no"', 'data-asks="yes"') if asks else page

    async def page(self, request: Request) -> Response:
        headers = {"content-security-policy": _POLICY, "x-content-type-options": "nosniff", "cache-control": "no-cache"}
        return Response(self._page, media_type="text/html; charset=utf-8", headers=headers)

    async def metrics(self, request: Request) -> Response:
        return Response(self._observer.exposition(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def stats(self, request: Request) -> Response:
        return JSONResponse(self._observer.stats(), headers={"cache-control": "no-store"})

    async def models(self, request: Request) -> Response:
        segments = self._host.segments()
        found = []
        for name in self._host.names():
            own = [segment for segment in segments if segment.model == name]
            with held(self._host, name) as hosted:
                found.append({"name": name, "digest": hosted.digest, **_described(hosted.manifest, own)})
        return JSONResponse({"models": found})


def _described(manifest: Manifest, segments: list[SegmentState]) -> dict[str, Any]:
    return {
        "inputs": [{"name": s.name, "dtype": s.dtype, "shape": list(s.shape)} for s in manifest.inputs],
        "classes": manifest.classes,
        "exits": [{"place": each.place, "head": each.head} for each in manifest.exits],
        "risk": manifest.risk,
        "tolerance": manifest.plans[manifest.default_plan].tolerance,
        "tolerances": sorted(plan.tolerance for plan in manifest.plans),
        "segments": [
            {"stage": s.stage, "loaded": s.loaded, "bytes": s.bytes} for s in sorted(segments, key=lambda s: s.stage)
        ],
    }


async def _offramp_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, OfframpError)
    return error_response(error)


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, RefusedError)
    return JSONResponse({"error": error.message}, status_code=error.status)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse({"error": error.detail}, status_code=error.status_code, headers=error.headers)


async def _bug(request: Request, error: Exception) -> Response:
    return JSONResponse({"error": "the server failed; its log says where"}, status_code=500)
