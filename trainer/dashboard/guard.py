"""Who may talk to the server: the browser that was opened with the token, and pages of this server only.

The server listens on the loopback interface, which other users of the machine and any web page in the user's browser
can reach, too. So each request needs a cookie that only the token gives, names a host that cannot be rebound by DNS,
and changes nothing unless it comes from a page of this server.
"""

from __future__ import annotations

import hmac
import re
import secrets
import sys
from collections.abc import Awaitable, Callable

from aiohttp import web
from aiohttp.typedefs import Middleware

from trainer.core.text import one_line

_LOOPBACK = re.compile(r"(127\.0\.0\.1|localhost|\[::1\])(:[0-9]{1,5})?", re.IGNORECASE)
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
_ENTER = """<!doctype html><html lang="en"><meta charset="utf-8"><title>trainer dashboard</title>
<link rel="icon" href="data:,"><meta http-equiv="refresh" content="0; url=/">
<p><a href="/">Open the dashboard</a></p></html>
"""
_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Guard:
    """Checks every request.

    Args:
        port: The port of the server; cookies of two dashboards of one machine differ by it.
        token: The secret in the URL.
    """

    def __init__(self, port: int, token: str) -> None:
        self._cookie = f"trainer_dashboard_{port}"
        self._token = token
        self._session = secrets.token_urlsafe(32)

    def middleware(self) -> Middleware:
        """Return the middleware of the application."""

        @web.middleware
        async def guard(request: web.Request, handler: _Handler) -> web.StreamResponse:
            refused = self._refusal(request)
            if refused is not None:
                response: web.StreamResponse = refused
            else:
                try:
                    response = await handler(request)
                except web.HTTPException as error:
                    response = web.Response(status=error.status, text=f"{error.status} {error.reason}\n")
                except Exception as error:  # of a run that nobody foresaw; aiohttp would print its text unescaped
                    text = one_line(f"{request.path}: {type(error).__name__}: {error}")
                    print(f"trainer: dashboard: {text}", file=sys.stderr, flush=True)
                    response = web.Response(status=500, text=f"{text}\n")
            response.headers.update(HEADERS)
            return response

        return guard

    def _refusal(self, request: web.Request) -> web.Response | None:
        """Return the answer to a request that must not be served; None if it may be."""
        host = request.headers.get("Host", "")
        if not _LOOPBACK.fullmatch(host):
            return _refuse(403, "open the dashboard as 127.0.0.1 or localhost, through an ssh tunnel from elsewhere")
        if request.method not in ("GET", "HEAD", "POST"):
            return _refuse(405, "method not allowed")
        if request.method == "POST" and not _is_from_here(request, host):
            return _refuse(403, "this request does not come from a page of the dashboard")
        token = request.query.get("token")
        if token is not None and request.method == "GET" and request.path == "/":
            return self._enter(token)
        if not hmac.compare_digest(request.cookies.get(self._cookie, "").encode(), self._session.encode()):
            return _refuse(401, "open the URL that `trainer dashboard` printed: it has a token")
        return None

    def _enter(self, token: str) -> web.Response:
        """Exchange the token for a cookie, and load the page without the token in its URL.

        By a page instead of a redirect: a link that is followed from another site gets no SameSite cookie on its way.
        """
        if not hmac.compare_digest(token.encode(), self._token.encode()):
            return _refuse(401, "the token is wrong: open the URL that `trainer dashboard` printed last")
        response = web.Response(text=_ENTER, content_type="text/html")
        response.set_cookie(self._cookie, self._session, httponly=True, samesite="Strict", path="/")
        return response


def _is_from_here(request: web.Request, host: str) -> bool:
    """Return whether a page of this server has sent it: browsers set `Origin`, and pages cannot."""
    return (
        request.headers.get("Origin", "").lower() == f"http://{host}".lower()
        and request.headers.get("Sec-Fetch-Site", "same-origin") == "same-origin"
        and request.content_type == "application/json"
    )


def _refuse(status: int, text: str) -> web.Response:
    return web.Response(status=status, text=f"{text}\n")
