"""The server of the dashboard: the page, the rows, the curves, the run pages, and two buttons."""

from __future__ import annotations

import asyncio
import json
import math
import time
from pathlib import Path
from typing import Any

from aiohttp import web

from trainer.core.errors import TrainerError
from trainer.core.text import printable
from trainer.dashboard import axes
from trainer.dashboard.actions import ACTIONS, act
from trainer.dashboard.aggregate import BANDS
from trainer.dashboard.catalogue import Catalogue, Entry
from trainer.dashboard.curves import Curve, Curves, Request
from trainer.dashboard.details import details_of
from trainer.dashboard.downsample import MOST_PIXELS
from trainer.dashboard.guard import Guard
from trainer.dashboard.logs import log_path, read_log
from trainer.dashboard.sweep_tables import sweep_table, sweeps_of
from trainer.dashboard.wire import packed
from trainer.sweeps.directory import SweepDirectory

STATIC = Path(__file__).with_name("static")
MOST_LINES = 200
"""Lines of one chart."""
_IDLE_S = 60.0
"""Without a page that asks, nothing is read any more."""
_TICK_S = 0.5
_COMPRESSED_BYTES = 64 << 10


class Server:
    """The application, and the task that keeps its rows current.

    Args:
        catalogue: The runs.
        curves: Their curves.
        guard: Who may ask.
        read_only: Whether runs cannot be stopped and resumed.
    """

    def __init__(self, catalogue: Catalogue, curves: Curves, guard: Guard, *, read_only: bool = False) -> None:
        self.catalogue, self.curves = catalogue, curves
        self._read_only = read_only
        self._asked = time.monotonic()
        self._session = f"{time.time():.6f}"
        self._details: dict[str, asyncio.Lock] = {}
        self._sweeps: dict[str, SweepDirectory] = {}
        self.app = web.Application(middlewares=[guard.middleware()], client_max_size=1 << 20)
        self.app.router.add_get("/", self._page)
        self.app.router.add_get("/api/rows", self._rows)
        self.app.router.add_post("/api/curves", self._curves)
        self.app.router.add_post("/api/metrics", self._metrics)
        self.app.router.add_get("/api/sweeps", self._list_sweeps)
        self.app.router.add_get("/api/sweeps/{key}", self._sweep)
        self.app.router.add_get("/api/runs/{key}", self._run)
        self.app.router.add_get("/api/runs/{key}/log", self._log)
        self.app.router.add_post("/api/runs/{key}/{action}", self._act)
        self.app.router.add_static("/static", STATIC, follow_symlinks=False, show_index=False)
        self.app.cleanup_ctx.append(self._background)

    async def _background(self, app: web.Application) -> Any:
        task = asyncio.create_task(self._refresh())
        await asyncio.to_thread(self.curves.prune)
        yield
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await self.curves.close()

    async def _refresh(self) -> None:
        """Keep the rows current as long as a page asks for them."""
        while True:
            if time.monotonic() - self._asked < _IDLE_S:
                await asyncio.to_thread(self.catalogue.refresh)
            await asyncio.sleep(_TICK_S)

    async def _page(self, request: web.Request) -> web.StreamResponse:
        return web.FileResponse(STATIC / "index.html")

    async def _rows(self, request: web.Request) -> web.Response:
        self._asked = time.monotonic()
        known = request.query.get("session") == self._session
        changes = self.catalogue.changes(_integer(request.query.get("since"), 0) if known else 0)
        changes |= {
            "session": self._session,
            "roots": [str(root) for root in self.catalogue.roots],
            "read_only": self._read_only,
            "now": time.time(),
        }
        return _json(changes)

    async def _metrics(self, request: web.Request) -> web.Response:
        """Return the names of the metrics of some runs."""
        entries = self._entries(await _body(request))
        names: dict[str, None] = {}
        for entry in entries:
            names |= dict.fromkeys(await self.curves.names(entry.run.metrics_path))
        return _json({"metrics": list(names)})

    async def _curves(self, request: web.Request) -> web.Response:
        """Return the curves of runs, or of groups of runs, as `wire.packed` writes them."""
        body = await _body(request)
        wanted = _request(body)
        entries = self._entries(body)
        sources = [(entry.run.metrics_path, entry.row or {}) for entry in entries]
        edges = await self.curves.edges(sources, wanted)
        if edges is None:
            return web.Response(body=packed({"edges": None, "curves": []}, []), content_type="application/octet-stream")
        groups = body.get("groups")
        drawn: list[tuple[dict[str, Any], Curve]] = []
        if isinstance(groups, list):
            for number, group in enumerate(groups[:MOST_LINES]):
                members = self._entries({"runs": group})
                pairs = [(entry.run.metrics_path, entry.row or {}) for entry in members]
                drawn.append(({"group": number}, await self.curves.band(pairs, wanted, edges[0])))
        else:
            found = await asyncio.gather(*(self.curves.curve(*source, wanted, edges[0]) for source in sources))
            drawn = [({"key": entry.key}, curve) for entry, curve in zip(entries, found, strict=True)]
        header = {"edges": edges[0], "whole": edges[1], "curves": [{**who, **one.facts} for who, one in drawn]}
        return web.Response(body=packed(header, [curve for _, curve in drawn]), content_type="application/octet-stream")

    async def _run(self, request: web.Request) -> web.Response:
        entry = self._entry(request)
        async with self._details.setdefault(entry.key, asyncio.Lock()):
            try:
                details = await asyncio.to_thread(details_of, entry.run)
            except TrainerError as error:
                return _json({"error": printable(error.message)}, status=422)
        return _json({"key": entry.key, **details})

    async def _list_sweeps(self, request: web.Request) -> web.Response:
        self._sweeps = await asyncio.to_thread(sweeps_of, self.catalogue.roots)
        return _json({"sweeps": [{"key": key, "name": f"{one.name} {one.id}"} for key, one in self._sweeps.items()]})

    async def _sweep(self, request: web.Request) -> web.Response:
        """Return the trials of a sweep; one that was not listed before is looked for."""
        key = request.match_info["key"]
        if key not in self._sweeps:
            self._sweeps = await asyncio.to_thread(sweeps_of, self.catalogue.roots)
        if key not in self._sweeps:
            raise web.HTTPNotFound
        try:
            return _json(await asyncio.to_thread(sweep_table, self._sweeps[key]))
        except TrainerError as error:
            return _json({"error": printable(error.message)}, status=422)

    async def _log(self, request: web.Request) -> web.Response:
        entry = self._entry(request)
        path = log_path(entry.run, request.query.get("name", ""))
        if path is None:
            raise web.HTTPNotFound
        offset, before = (
            _integer(request.query[name]) if name in request.query else None for name in ("offset", "before")
        )
        try:
            return _json(await asyncio.to_thread(read_log, path, offset, before))
        except OSError as error:
            return _json({"error": error.strerror or "it cannot be read"}, status=422)

    async def _act(self, request: web.Request) -> web.Response:
        entry, action = self._entry(request), request.match_info["action"]
        if action not in ACTIONS:
            raise web.HTTPNotFound
        if self._read_only:
            raise web.HTTPForbidden
        await _body(request)
        answer = await act(action, entry.run)
        await asyncio.to_thread(self.catalogue.look)
        return _json(answer)

    def _entry(self, request: web.Request) -> Entry:
        entry = self.catalogue.entry(request.match_info["key"])
        if entry is None:
            raise web.HTTPNotFound
        return entry

    def _entries(self, body: dict[str, Any]) -> list[Entry]:
        """Return the runs that a request names, without those that are gone."""
        keys = body.get("runs")
        if not isinstance(keys, list):
            raise web.HTTPBadRequest
        found = (self.catalogue.entry(key) for key in keys[: 10 * MOST_LINES] if isinstance(key, str))
        return [entry for entry in found if entry is not None][:MOST_LINES]


def _request(body: dict[str, Any]) -> Request:
    """Return what is to be drawn. A value that makes no sense is that of a page of another version: refused."""

    def number(name: str, default: float | None) -> Any:
        value = body.get(name, default)
        if value is not None and (type(value) not in (int, float) or not math.isfinite(value)):
            raise web.HTTPBadRequest
        return value

    metric, axis, band = body.get("metric"), body.get("axis", "step"), body.get("band", "deviation")
    if not isinstance(metric, str) or axis not in axes.NAMES or band not in BANDS:
        raise web.HTTPBadRequest
    return Request(
        metric=metric,
        axis=axis,
        start=number("start", None),
        end=number("end", None),
        pixels=int(min(max(number("pixels", 600) or 600, 1), MOST_PIXELS)),
        smoothing=float(number("smoothing", 0.0) or 0.0),
        log_x=body.get("log_x") is True,
        band=band,
    )


async def _body(request: web.Request) -> dict[str, Any]:
    try:
        body = await request.json()
    except (ValueError, RecursionError):
        raise web.HTTPBadRequest from None
    if not isinstance(body, dict):
        raise web.HTTPBadRequest
    return body


def _integer(text: str | None, default: int | None = None) -> Any:
    if text is None or not text.removeprefix("-").isdecimal() or len(text) > 18:
        return default
    return int(text)


def _json(content: Any, status: int = 200) -> web.Response:
    text = json.dumps(_plain(content), allow_nan=False, separators=(",", ":"))
    response = web.Response(text=text, content_type="application/json", status=status)
    if len(text) > _COMPRESSED_BYTES:
        response.enable_compression()
    return response


def _plain(value: Any) -> Any:
    """Return plain data without the numbers that JSON does not have, and with texts that encode."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value
