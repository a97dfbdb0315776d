"""Requests to the Hub: where it is, how often it may be asked, and what to do when it does not answer.

`probelog.hub.listing` and `probelog.hub.download` are built on this. It pages and downloads with its own HTTP client in
place of `huggingface_hub`'s, because that one raises on the first malformed row of a listing, retries only some
calls, has no read timeout by default and knows nothing of a rate limit that many workers share. The address and
the token are the library's (``HF_ENDPOINT``, ``HF_TOKEN``). ``HF_HUB_OFFLINE`` is not looked at: workers set it so
that *loading* a model stays local.
"""

from __future__ import annotations

import base64
import contextlib
import datetime as dt
import json
import logging
import os
import random
import re
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from http.cookiejar import CookieJar
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urljoin, urlsplit

from probelog.credentials import redacted, split_login, with_login
from probelog.errors import ProbeLogError, UsageError
from probelog.hub import huggingface
from probelog.hub.rate_limit import Kind, Limiter, SlidingWindowLimit, is_loopback
from probelog.hub.usage import METER, HubUsage

if TYPE_CHECKING:
    import httpx

    from probelog.hub.network import Clock

log = logging.getLogger(__name__)

T = TypeVar("T")

MEBIBYTE = 1024 * 1024
SHA_PATTERN = re.compile(r"[0-9a-f]{40}")
_MAX_REDIRECTS = 5
# As Python objects, JSON that is made to be costly takes twenty times its size.
_MAX_JSON = 64 * MEBIBYTE
_MAX_ADDRESS = 8192
_RETRIED = frozenset({408, 425, 500, 502, 503, 504, 520, 521, 522, 523, 524, 529})


class HubError(ProbeLogError):
    """The Hub cannot be used as asked."""


class HubUnavailableError(HubError):
    """The Hub did not answer properly, several times in a row. Another day it may."""


class HubRefusalError(HubError):
    """The Hub answered, and its answer is no.

    ``status`` is the HTTP status; ``code`` the Hub's own word for it (``X-Error-Code``: RepoNotFound,
    RevisionNotFound, EntryNotFound, GatedRepo) or empty; ``message`` its sentence or empty.
    """

    def __init__(self, address: str, status: int, code: str, message: str) -> None:
        self.address, self.status, self.code, self.message = (
            redacted(address),
            status,
            code,
            redacted(message),
        )
        said = ", ".join(part for part in (code, self.message) if part)
        hint = (
            " Check HF_TOKEN: it is missing, wrong, or lacks the permission." if status in (401, 403) else ""
        )
        super().__init__(f"{self.address} answered {status}{f' ({said})' if said else ''}.{hint}")

    @property
    def bad_token(self) -> bool:
        """Whether the Hub knows no such token, so that nothing will work with it."""
        return self.status == 401 and self.message.startswith("Invalid credentials")

    def __reduce__(self) -> tuple[type[HubRefusalError], tuple[str, int, str, str]]:
        return type(self), (self.address, self.status, self.code, self.message)


class BrokenAnswerError(Exception):
    """An answer that broke off or makes no sense. `HubClient.call` tries again; it never leaves that function."""


@dataclass(frozen=True, slots=True)
class Retry:
    """How patient a client is. Times in seconds.

    A request is tried ``attempts`` times with waits that double from ``first_wait`` to ``longest_wait``, each
    shortened at random by up to a half, so that many workers do not come back together. "Too many requests" is no
    failure: it is waited out as long as the Hub says (``longest_penalty`` at most), ``throttled`` times in a row.
    The headers of an answer must be there ``read_timeout`` after the connection, whatever comes before them. A body that
    brings fewer than ``slowest`` bytes a second over ``read_timeout`` counts as stalled; an answer of the API must be
    whole after ``api_timeout``.
    """

    attempts: int = 6
    first_wait: float = 1.0
    longest_wait: float = 30.0
    throttled: int = 20
    longest_penalty: float = 330.0
    connect_timeout: float = 10.0
    read_timeout: float = 30.0
    slowest: float = 1024.0
    api_timeout: float = 300.0

    def wait(self, failures: int) -> float:
        """How long to wait after so many failures in a row (1 or more)."""
        longest = min(self.longest_wait, self.first_wait * 2.0 ** min(failures - 1, 30))
        return longest * random.uniform(0.5, 1.0)  # noqa: S311 - spreads load, guards nothing


PATIENT = Retry()


@dataclass(frozen=True)
class HubResponse:
    """An open answer.

    ``url`` is what was asked for (a redirect may have led on). ``headers`` (lower-case names) are the answer's own,
    and what only the Hub's hop of a redirect says about a file. ``clock`` is the request's. ``storage`` is the host that
    answered where that is not the Hub; else empty.
    """

    url: str
    response: httpx.Response
    headers: Mapping[str, str]
    clock: Clock
    storage: str = ""

    def refusal(self) -> HubRefusalError:
        """The answer, which is no success, as an error."""
        return HubRefusalError(
            self.url.partition("?")[0],
            self.response.status_code,
            self.headers.get("x-error-code", "")[:100],
            self.headers.get("x-error-message", "")[:300],
        )


@dataclass(frozen=True)
class JsonResponse:
    """A JSON answer.

    ``next_url`` is the address of the next page, if there is one (on the client's own endpoint); ``date`` when it was
    sent, by the Hub's clock, where the Hub says so.
    """

    value: Any
    next_url: str | None
    date: dt.datetime | None = None


@dataclass
class Route:
    """Where the Hub's redirect for one file led: further requests for it go there until that address expires.

    The Hub counts redirects, not what its storage answers. For one thread.
    """

    url: httpx.URL | None = None
    headers: Mapping[str, str] = field(default_factory=dict)


class HubClient:
    """Requests to one Hub, with timeouts, retries and a rate limit. Use as a context manager; shared by threads.

    Make one for many requests: it keeps connections open, and making it reads the machine's certificates (some 30 ms
    of processor time). The token is read once. Cookies are not kept.

    A user and password in the endpoint (a mirror's) are sent to it in place of the token, to nobody else, and stand in no
    address that this client gives or names. Those of ``HF_ENDPOINT`` serve for the same address without them, too.

    Args:
        endpoint: the Hub's address; that of `huggingface_hub` (``HF_ENDPOINT``) where None.
        limiter: shared with whoever else asks the same Hub; one of its own where None.
        retry: how patient to be.

    Raises:
        UsageError: the endpoint is no http(s) address.
    """

    def __init__(
        self, endpoint: str | None = None, *, limiter: Limiter | None = None, retry: Retry = PATIENT
    ) -> None:
        import httpx

        import probelog
        from probelog.hub.network import Network

        self.endpoint, login = split_login(checked_endpoint(endpoint))
        self.retry = retry
        # The library's own headers are not used: to make them it asks the Hub for a list of agents and keeps it
        # in the home folder.
        token = huggingface.token()
        self.has_token = token is not None
        self._authorization = {"authorization": f"Bearer {token}"} if token else {}
        if (login := login or _login_of(self.endpoint)) is not None:
            encoded = base64.b64encode(":".join(login).encode()).decode("ascii")
            self._authorization = {"authorization": f"Basic {encoded}"}
        self.limiter = limiter or SlidingWindowLimit.for_endpoint(self.endpoint, with_token=self.has_token)
        self._origin = httpx.URL(self.endpoint)
        self._http = httpx.Client(
            headers={"user-agent": f"probelog/{probelog.__version__}"},
            timeout=httpx.Timeout(retry.read_timeout, connect=retry.connect_timeout),
            follow_redirects=False,
            cookies=_NoCookies(),
            trust_env=not is_loopback(self.endpoint),  # a proxy would look for 127.0.0.1 on its own machine
        )
        self._network = Network(self._http, self._origin)

    def __enter__(self) -> HubClient:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def json(self, url: str, params: Mapping[str, Any] | None = None) -> JsonResponse:
        """Get one JSON document. ``url`` is absolute or a path on the endpoint.

        Raises:
            HubRefusalError: the Hub said no (4xx).
            HubUnavailableError: no proper answer after all retries.
            HubError: the address leads away from the endpoint, or the answer is too long.
        """
        full = self.url(url, params or {})

        def read(answer: HubResponse) -> JsonResponse:
            if answer.response.status_code != 200:
                raise answer.refusal()
            body = bytearray()
            for chunk in chunks(answer, self.retry, compressed=True):
                body += chunk
                if len(body) > _MAX_JSON:
                    raise HubError(f"{full} answered with more than {_MAX_JSON // MEBIBYTE} MiB of JSON")
            following = answer.response.links.get("next", {}).get("url")
            return JsonResponse(
                parse_json(bytes(body)),
                self.reroot(following) if following else None,
                _date(answer.headers),
            )

        return self.call("api", full, read)

    def url(self, path: str, params: Mapping[str, Any]) -> str:
        """The address of a path of the API with parameters (lists are repeated) added to those it has."""
        import httpx

        full = self.reroot(path)
        return str(httpx.URL(full).copy_merge_params(dict(params))) if params else full

    def call(
        self,
        kind: Kind,
        url: str,
        read: Callable[[HubResponse], T],
        headers: Callable[[], Mapping[str, str]] = dict,
        check: Callable[[], None] = lambda: None,
        route: Route | None = None,
    ) -> T:
        """Send a GET request until ``read`` makes something of the answer.

        ``read`` gets every answer but 429, server errors and refusals of a storage host, which say nothing about the
        repository: each redirect signs another address, and one may have expired. When it raises
        `BrokenAnswerError` or an error of the transport, the request is sent again, with ``headers()`` asked anew
        (a download resumes where it broke off). Any other exception of ``read`` passes through. ``check`` is called
        again and again meanwhile, also where nothing comes; what it raises ends the request. ``route`` keeps where
        redirects led, for the next request with it.

        Raises:
            HubUnavailableError: no proper answer after all retries.
            HubError: a redirect that is not followed.
        """
        import httpx

        from probelog.hub.network import Clock

        failures = throttled = 0
        shown = url.partition("?")[0]
        route = route or Route()
        while True:
            straight = route.url is not None
            if not straight:
                with METER.waiting():
                    self.limiter.acquire(kind)
                METER.request(kind)
            longer = 0.0
            clock = Clock(self.retry.api_timeout if kind == "api" else float("inf"), check)
            try:
                with self._network.request(clock), self._opened(kind, url, headers(), clock, route) as answer:
                    status = answer.response.status_code
                    if status >= 400:
                        route.url = None
                    if status == 429:
                        throttled += 1
                        METER.add(HubUsage(throttled=1))
                        self._wait_out(kind, answer.headers, throttled)
                        continue
                    refused_by_storage = answer.storage and status >= 400 and status != 416
                    if refused_by_storage and straight:
                        continue  # the address expired, most likely
                    if status not in _RETRIED and not refused_by_storage:
                        return read(answer)
                    where = f"was redirected to {answer.storage}, which " if answer.storage else ""
                    problem, longer = f"{where}answered {status}", _retry_after(answer.headers) or 0.0
            except httpx.ConnectError as error:
                problem = f"refuses connections or is not there: {_shown(error)}"
            except httpx.TimeoutException as error:
                problem = f"did not answer in time ({type(error).__name__})"
            except (httpx.TransportError, httpx.DecodingError) as error:
                problem = f"broke off: {_shown(error)}"
            except BrokenAnswerError as error:
                problem = str(error)
            route.url = None
            failures += 1
            if failures >= self.retry.attempts:
                raise HubUnavailableError(
                    f"{shown} {problem} ({failures} tries). Check the network and that HF_ENDPOINT "
                    f"({self.endpoint}) is your Hub; then run again: what was done is kept."
                )
            wait = max(self.retry.wait(failures), min(longer, self.retry.longest_penalty))
            log.warning("%s %s; next try in %.1f s", shown, problem, wait)
            until = time.monotonic() + wait
            with METER.waiting():
                while (left := until - time.monotonic()) > 0:
                    check()
                    time.sleep(min(left, 0.5))

    def _wait_out(self, kind: Kind, headers: Mapping[str, str], throttled: int) -> None:
        """Tell the limiter how long "too many requests" lasts: as the Hub says, else as after a failure."""
        if throttled > self.retry.throttled:
            raise HubUnavailableError(
                f"{self.endpoint} said 'too many requests' {throttled} times in a row. Wait, use fewer workers, or "
                "set HF_TOKEN for a higher limit; then run again: what was done is kept."
            )
        said = _retry_after(headers)
        # The header comes with every answer: where requests remain (r), something else is the reason.
        reset = re.search(r";\s*r\s*=\s*0\s*;\s*t\s*=\s*(\d{1,6})", headers.get("ratelimit", ""))
        if said is None and reset:
            said = float(reset[1]) + 1.0  # it counts whole seconds, down to 0
        wait = min(self.retry.wait(throttled) if said is None else said, self.retry.longest_penalty)
        log.warning("%s: too many requests; next %s request in %.0f s", self.endpoint, kind, wait)
        self.limiter.penalise(kind, wait)

    def reroot(self, url: str) -> str:
        """An address of the Hub's API on this client's endpoint: its path and query only.

        Mirrors pass the public Hub's ``Link`` headers through: followed as they are, they would lead a crawl (and
        its token) away from the mirror.

        Raises:
            HubError: not an address of the API.
        """
        import httpx

        base = urlsplit(self.endpoint)
        try:
            target = urlsplit(urljoin(self.endpoint + "/", url))
            httpx.URL(url)
            if len(url) > _MAX_ADDRESS:
                raise ValueError("too long")
        except (ValueError, httpx.InvalidURL) as error:
            raise HubError(f"{self.endpoint} names a next page that is no address: {url[:200]!r}") from error
        path = target.path if target.path.startswith(base.path + "/") else base.path + target.path
        if not path.startswith(base.path + "/api/"):
            raise HubError(f"{self.endpoint} names a next page outside its API: {url[:200]!r}")
        if (target.scheme, target.netloc) != (base.scheme, base.netloc):
            log.info("the next page is said to be on %s; staying on %s", target.netloc[:200], base.netloc)
        return f"{base.scheme}://{base.netloc}{path}" + (f"?{target.query}" if target.query else "")

    @contextlib.contextmanager
    def _opened(
        self, kind: Kind, url: str, headers: Mapping[str, str], clock: Clock, route: Route
    ) -> Iterator[HubResponse]:
        import httpx

        current, seen = route.url or httpx.URL(url), dict(route.headers if route.url else {})
        for _ in range(_MAX_REDIRECTS + 1):
            ours = (current.scheme, current.netloc) == (self._origin.scheme, self._origin.netloc)
            encoding = {"accept-encoding": "gzip" if kind == "api" else "identity"}
            sent = {**encoding, **headers, **(self._authorization if ours else {})}
            request = self._http.build_request("GET", current, headers=sent)
            clock.begin_headers(self.retry.connect_timeout + self.retry.read_timeout)
            response = self._sent(url, request)
            if not clock.answered:
                # It came behind the last answer on this connection: whoever could slip it in there chose what it answers.
                response.extensions["network_stream"].close()
                response.close()
                raise BrokenAnswerError("answered before it was asked")
            try:
                for name, value in response.headers.items():
                    seen.setdefault(name, value)
                if not response.has_redirect_location:
                    refused_by_hub = (
                        "x-error-code" in response.headers or "x-error-message" in response.headers
                    )
                    storage = "" if ours or refused_by_hub else current.host
                    if storage:
                        route.url, route.headers = current, _linked(seen)
                    yield HubResponse(url, response, {**response.headers, **_linked(seen)}, clock, storage)
                    return
                current = self._redirected(kind, url, current, response.headers["location"])
            finally:
                response.close()
        raise HubError(f"{url} redirects more than {_MAX_REDIRECTS} times")

    def _sent(self, url: str, request: httpx.Request) -> httpx.Response:
        import httpx

        from probelog.hub.network import AddressError

        try:
            self._network.check_literal(request.url.host)
            return self._http.send(request, stream=True)
        except AddressError as error:
            raise HubError(
                f"{url} redirects to {error}, which is not followed. If that is right, set HF_ENDPOINT to an address of "
                "your Hub within that network."
            ) from error
        except httpx.InvalidURL as error:  # it prepares the next hop though it is not to follow it
            raise HubError(f"{url} redirects to what is no address") from error
        except (
            ValueError
        ) as error:  # reason: h11 and httpx read some headers (lengths, ports) without a limit
            raise BrokenAnswerError(f"answered with headers that make no sense: {_shown(error)}") from error

    def _redirected(self, kind: Kind, url: str, current: httpx.URL, location: str) -> httpx.URL:
        import httpx

        try:
            target = current.join(location)
            if len(location) > _MAX_ADDRESS or not target.host:  # reading an international host can fail too
                raise ValueError("too long, or without a host")
        except (httpx.InvalidURL, ValueError) as error:
            raise HubError(f"{url} redirects to what is no address: {location[:200]!r}") from error
        shown = f"{target.scheme}://{target.netloc.decode('ascii', 'replace')}"[:300]
        if target.scheme not in ("http", "https"):
            raise HubError(f"{url} redirects to {shown}, which is not followed")
        if current.scheme == "https" and target.scheme == "http":
            raise HubError(f"{url} redirects to {shown}, without encryption, which is not followed")
        if target.userinfo:  # httpx would send it as a user's name and password
            raise HubError(f"{url} redirects to {shown} with a password, which is not followed")
        moved = (target.scheme, target.netloc) != (self._origin.scheme, self._origin.netloc)
        if kind == "api" and moved:
            raise HubError(
                f"{self.endpoint} redirects its API to {shown}. If you trust it, set HF_ENDPOINT to it."
            )
        return target


def chunks(answer: HubResponse, retry: Retry, *, compressed: bool = False) -> Iterator[bytes]:
    """The body of an answer in pieces of a bounded size, as long as it comes at a bearable speed.

    Raises:
        BrokenAnswerError: slower than ``retry.slowest`` bytes a second for ``retry.read_timeout`` seconds (one read that
            brings nothing at all in that time is httpx's own timeout), or in an encoding that was not asked for: gzip
            where ``compressed``, and never one within another, of which a few kilobytes make gigabytes.
    """
    encoding = answer.response.headers.get("content-encoding", "").strip().lower()
    pieces: Iterator[bytes] = answer.response.iter_raw()
    if compressed and encoding == "gzip":
        pieces = _unzipped(pieces)
    elif encoding not in ("", "identity"):
        raise BrokenAnswerError(f"answered in the encoding {encoding[:60]!r}, which was not asked for")
    since, received = time.monotonic(), 0
    while True:
        answer.clock.begin_piece(retry.read_timeout)
        if (chunk := next(pieces, None)) is None:
            return
        yield chunk
        received += len(chunk)
        elapsed = time.monotonic() - since
        if elapsed >= retry.read_timeout:
            if received < retry.slowest * elapsed:
                raise BrokenAnswerError(f"stalled: {received} bytes in {elapsed:.0f} s")
            since, received = time.monotonic(), 0


def _unzipped(pieces: Iterator[bytes]) -> Iterator[bytes]:
    """What gzip holds, a mebibyte at most at a time."""
    unzip = zlib.decompressobj(16 + zlib.MAX_WBITS)
    for piece in pieces:
        while piece:
            if unzip.eof:
                raise BrokenAnswerError("goes on after the end of its compressed body")
            try:
                plain = unzip.decompress(piece, MEBIBYTE)
            except zlib.error as error:
                raise BrokenAnswerError(f"answered with broken gzip: {error}") from error
            if plain:
                yield plain
            piece = unzip.unconsumed_tail or unzip.unused_data
    if not unzip.eof:
        raise BrokenAnswerError("broke off in the middle of its compressed body")


def parse_json(body: bytes) -> object:
    """JSON with untrusted text in it: broken UTF-8 is replaced, numbers beyond 64 bits and NaN become None.

    Raises:
        BrokenAnswerError: it is no JSON, or nested too deep.
    """
    try:
        return json.loads(
            body.decode("utf-8", "replace"), parse_int=_bounded_int, parse_constant=lambda _: None
        )
    except (ValueError, RecursionError) as error:
        raise BrokenAnswerError(f"answered with broken JSON ({len(body)} bytes): {error}") from error


def checked_endpoint(endpoint: str | None = None) -> str:
    """The Hub's address without a trailing slash: the one given, else that of `huggingface_hub`.

    Raises:
        UsageError: no http(s) address.
    """
    if endpoint is None:
        from huggingface_hub import constants

        endpoint = constants.ENDPOINT
    try:
        split = urlsplit(endpoint)
        valid = (
            split.scheme in ("http", "https")
            and bool(split.hostname)
            and (split.port is None or split.port > 0)
            and not (split.query or split.fragment)
        )
    except ValueError:
        valid = False
    if not valid:
        raise UsageError(
            f"the Hub's address {endpoint!r} is no http(s) address of a Hub (without query). Set HF_ENDPOINT to one, "
            "or unset it; a token goes into HF_TOKEN."
        )
    return endpoint.rstrip("/")


def endpoint_with_login(endpoint: str) -> str:
    """An endpoint with the user and password of ``HF_ENDPOINT``, where that has any: for processes without that variable."""
    return with_login(endpoint, _login_of(endpoint))


def _login_of(endpoint: str) -> tuple[str, str] | None:
    address, login = split_login(os.environ.get("HF_ENDPOINT", "").rstrip("/"))
    return login if address == endpoint else None


class _NoCookies(CookieJar):
    """Looks at no cookie: the standard library's parser prints tracebacks about some that servers can make."""

    def extract_cookies(self, response: object, request: object) -> None:
        """Nothing is kept."""


def _shown(error: Exception) -> str:
    """The message of a foreign error, which may quote what was sent."""
    return str(error)[:300]


def _bounded_int(text: str) -> int | None:
    return int(text) if len(text) < 19 else None


def _linked(headers: Mapping[str, str]) -> dict[str, str]:
    """What only the Hub's own hop of a redirect says about a file."""
    return {
        name: headers[name] for name in ("x-linked-etag", "x-linked-size", "x-repo-commit") if name in headers
    }


def _date(headers: Mapping[str, str]) -> dt.datetime | None:
    try:
        date = parsedate_to_datetime(headers.get("date", ""))
        return date.replace(tzinfo=date.tzinfo or dt.UTC).astimezone(dt.UTC)
    except (ValueError, OverflowError):
        return None


def _retry_after(headers: Mapping[str, str]) -> float | None:
    said = headers.get("retry-after", "").strip()
    return float(said) if re.fullmatch(r"\d{1,6}(\.\d+)?", said, re.ASCII) else None
