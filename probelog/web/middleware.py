"""What stands around every answer: whom it may go to, its security headers, how long it took, and errors as problems.

Errors are problem details (RFC 9457) for programs, and a page for people.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from http import HTTPStatus

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

log = logging.getLogger(__name__)

# Requests that are being answered; a connection has one at a time.
_MOST_REQUESTS = 500
SECURITY_HEADERS = {
    # Nothing from elsewhere and nothing inline. Pictures that a visitor chose are shown from the page itself.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), microphone=(), geolocation=()",
}
LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})


class Metrics:
    """What Prometheus is told of the server."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "probelog_web_requests", "Answers by page and status.", ["page", "status"], registry=self.registry
        )
        self.seconds = Histogram(
            "probelog_web_request_seconds",
            "Seconds until an answer was ready to be sent.",
            ["page"],
            buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10),
            registry=self.registry,
        )
        self.active = Gauge(
            "probelog_web_requests_active", "Requests that are being answered.", registry=self.registry
        )

    def gauge(self, name: str, meaning: str, value: Callable[[], float]) -> None:
        """Add a number that is read when Prometheus asks."""
        Gauge(f"probelog_web_{name}", meaning, registry=self.registry).set_function(value)


class Guard:
    """The outermost layer of the application.

    Args:
        app: what answers.
        metrics: gets counts and times.
        problem: makes the answer for a status and a reason.
        hosts: names that the server may be called by; None: any. A page elsewhere whose name is made to point at this
            machine (DNS rebinding) could else read an index that only this machine may see.
    """

    def __init__(
        self,
        app: ASGIApp,
        metrics: Metrics,
        problem: Callable[[Request, int, str], Response],
        hosts: Sequence[str] | None,
    ) -> None:
        self._app = app
        self._metrics = metrics
        self._problem = problem
        self._hosts = None if hosts is None else {*hosts}
        self._active = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status = time.perf_counter(), 0

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                for name, value in SECURITY_HEADERS.items():
                    headers[name] = value
                headers.setdefault("Cache-Control", "no-cache")
                self._metrics.seconds.labels(_page(scope)).observe(time.perf_counter() - began)
            await send(message)

        self._active += 1
        self._metrics.active.set(self._active)
        try:
            await self._answer(scope, receive, send_with_headers)
        except Exception:  # reason: whatever fails, the visitor gets an answer and the server goes on
            log.exception("an answer failed")
            if status:
                raise
            await self._refuse(
                scope, receive, send_with_headers, 500, "this is a fault of ProbeLog's own; its log says more"
            )
        finally:
            self._active -= 1
            self._metrics.active.set(self._active)
            self._metrics.requests.labels(_page(scope), str(status)).inc()

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._hosts is not None and _host(scope) not in self._hosts:
            reason = "this server does not answer by that name; start it with --allow-host NAME if it shall"
            await self._refuse(scope, receive, send, HTTPStatus.MISDIRECTED_REQUEST, reason)
        elif self._active > _MOST_REQUESTS:
            await self._refuse(scope, receive, send, HTTPStatus.SERVICE_UNAVAILABLE, "too many ask at once")
        else:
            await self._app(scope, receive, send)

    async def _refuse(self, scope: Scope, receive: Receive, send: Send, status: int, reason: str) -> None:
        await self._problem(Request(scope), status, reason)(scope, receive, send)


def _host(scope: Scope) -> str:
    """The name that a server was called by, without its port."""
    host = Headers(scope=scope).get("host", "")
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.rpartition(":")[0] if ":" in host else host


def _page(scope: Scope) -> str:
    """What answered, so that metrics have as many names as there are pages."""
    return str(getattr(scope.get("endpoint"), "__name__", "none"))
