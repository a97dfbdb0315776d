"""What no answer may do to a request, whoever sends it: last without end, or lead to an address of one's own network.

A backend for httpcore, the library that httpx sends with. Its own timeouts bound a single read; an answer that brings a
byte in time, or one interim answer (103) after the other, has all the time in the world. Here every read of one request
counts against that request's `Clock`. And names are resolved here, so that the address that is checked is the one
connected to, whatever the name resolves to a moment later.
"""

from __future__ import annotations

import contextlib
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from enum import IntEnum
from typing import Any, TypeVar

import httpcore
import httpx

#: Headers of one answer with all interim answers before it, and what comes with their last piece.
MAX_HEADER_BYTES = 512 * 1024
#: How often ``check`` is called while nothing comes.
_TICK = 0.5

T = TypeVar("T")


class AddressError(Exception):
    """A redirect leads to an address that its Hub has no business with."""


class Reach(IntEnum):
    """From how far an address can be reached; a Hub may redirect to what is reached from as far as itself or farther."""

    EVERYWHERE = 0
    NETWORK = 1
    MACHINE = 2
    NOWHERE = (
        3  # link-local addresses, where clouds give out credentials, and what is no host's address at all
    )


# Where clouds answer their machines outside of the link-local range: AWS over IPv6, Alibaba, Azure, Oracle.
_METADATA = frozenset(
    map(ipaddress.ip_address, ("fd00:ec2::254", "100.100.100.200", "168.63.129.16", "192.0.0.192"))
)
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")


def reach(address: str) -> Reach:
    """Where an IP address can be reached from; of an IPv6 address that holds one of IPv4, where that one can."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else None)
        if ip in _NAT64:
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        ip = inner or ip
    if ip.is_loopback:
        return Reach.MACHINE
    if ip in _METADATA or ip.is_link_local or ip.is_multicast or ip.is_unspecified or ip.is_reserved:
        return Reach.NOWHERE
    return Reach.EVERYWHERE if ip.is_global else Reach.NETWORK


class Clock:
    """The time that one request has. ``check`` is called while it waits; what that raises ends the request."""

    def __init__(self, seconds: float, check: Callable[[], None]) -> None:
        self._end = time.monotonic() + seconds
        self._until = self._end
        self._header_bytes: int | None = None
        self.check = check

    def begin_headers(self, seconds: float) -> None:
        """The headers must be there in so many seconds."""
        self._header_bytes = MAX_HEADER_BYTES
        self._until = min(self._end, time.monotonic() + seconds)

    @property
    def answered(self) -> bool:
        """Whether any byte came since the request was sent."""
        return self._header_bytes != MAX_HEADER_BYTES

    def begin_piece(self, seconds: float) -> None:
        """The next piece of the body must be there in so many seconds."""
        self._header_bytes = None
        self._until = min(self._end, time.monotonic() + seconds)

    def left(self, timeout: float | None) -> float:
        """For how long the next operation may last; 0 when the time is up."""
        left = max(0.0, self._until - time.monotonic())
        return left if timeout is None else min(left, timeout)

    def count(self, size: int) -> None:
        """So many bytes came."""
        if self._header_bytes is not None:
            self._header_bytes -= size
            if self._header_bytes < 0:
                raise httpcore.RemoteProtocolError(f"more than {MAX_HEADER_BYTES >> 10} KiB of headers")


class _Clocks(threading.local):
    current: Clock | None = None


class Network:
    """The network as one client sees it: `request` for each of its requests, which its connections then keep to."""

    def __init__(self, client: httpx.Client, endpoint: httpx.URL) -> None:
        self._clocks = _Clocks()
        self._hub = endpoint
        self.hub_reach = Reach.EVERYWHERE  # until its address is known
        with contextlib.suppress(ValueError):
            self.hub_reach = reach(endpoint.host)
        # httpx has no argument for the backend of its transports.
        for transport in {client._transport, *filter(None, client._mounts.values())}:
            pool = getattr(transport, "_pool", None)
            if not isinstance(pool, httpcore.ConnectionPool) or not hasattr(pool, "_network_backend"):
                raise RuntimeError(
                    f"httpx {httpx.__version__} is not known: its connections cannot be guarded"
                )
            proxied = type(pool) is not httpcore.ConnectionPool
            pool._network_backend = _Backend(self, check_addresses=not proxied)

    @contextlib.contextmanager
    def request(self, clock: Clock) -> Iterator[None]:
        """Hold the requests of this thread to a clock."""
        self._clocks.current = clock
        try:
            yield
        finally:
            self._clocks.current = None

    @property
    def clock(self) -> Clock:
        """That of this thread's request."""
        return self._clocks.current or Clock(60.0, lambda: None)

    def is_hub(self, host: str, port: int) -> bool:
        """Whether this is the Hub itself, which is where the operator says."""
        own = self._hub.port or (443 if self._hub.scheme == "https" else 80)
        return (host, port) == (self._hub.host, own)

    def refuse(self, host: str, address: str, found: Reach) -> None:
        """Raise AddressError for an address that is not reached from as far as the Hub."""
        if found is Reach.NOWHERE or found > self.hub_reach:
            named = host if host == address else f"{host} ({address})"
            raise AddressError(f"{named[:200]}, an address of a closer network than the Hub's own")

    def check_literal(self, host: str) -> None:
        """Refuse an address written as such: a proxy connects to it without being asked here.

        Raises:
            AddressError: it is not reached from as far as the Hub.
        """
        if host == self._hub.host:
            return
        with contextlib.suppress(OSError, ValueError):
            address = (
                host if ":" in host else socket.inet_ntoa(socket.inet_aton(host))
            )  # 127.1 and 0x7f000001 too
            self.refuse(host, address, reach(address))
        if host == "localhost" or host.endswith(".localhost"):
            self.refuse(host, host, Reach.MACHINE)


class _Backend(httpcore.NetworkBackend):
    def __init__(self, network: Network, *, check_addresses: bool) -> None:
        self._network = network
        self._check_addresses = check_addresses
        self._plain = httpcore.SyncBackend()

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.NetworkStream:
        network = self._network
        clock = network.clock
        try:
            resolved = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            raise httpcore.ConnectError(f"{host[:200]} cannot be resolved: {error}") from error
        addresses = list(dict.fromkeys(str(entry[4][0]) for entry in resolved))
        guarded = self._check_addresses and not network.is_hub(host, port)
        problem: Exception = httpcore.ConnectError(f"{host[:200]} has no address")
        for address in addresses:
            clock.check()
            left = clock.left(timeout)
            if left <= 0:
                raise httpcore.ConnectTimeout("timed out")
            try:
                if guarded:
                    network.refuse(host, address, reach(address))
                stream = self._plain.connect_tcp(address, port, left, local_address, socket_options)
            except (httpcore.ConnectError, httpcore.ConnectTimeout, AddressError) as error:
                problem = error
                continue
            # What answers at one's own address is this machine, however public the address is.
            itself = stream.get_extra_info("client_addr")[0] == stream.get_extra_info("server_addr")[0]
            found = max(reach(address), Reach.MACHINE) if itself else reach(address)
            if guarded:
                try:
                    network.refuse(host, address, found)
                except AddressError:
                    stream.close()
                    raise
            elif self._check_addresses:
                network.hub_reach = max(found, network.hub_reach)
            return _Stream(stream, network)
        raise problem

    def sleep(self, seconds: float) -> None:
        self._plain.sleep(seconds)


class _Stream(httpcore.NetworkStream):
    def __init__(self, stream: httpcore.NetworkStream, network: Network) -> None:
        self._stream, self._network = stream, network

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        clock = self._network.clock
        end = time.monotonic() + clock.left(timeout)
        while True:
            clock.check()
            left = end - time.monotonic()
            if left <= 0:
                raise httpcore.ReadTimeout("timed out")
            with contextlib.suppress(httpcore.ReadTimeout):
                data = self._stream.read(max_bytes, min(left, _TICK))
                clock.count(len(data))
                return data

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._stream.write(buffer, max(1e-3, self._network.clock.left(timeout)))

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.NetworkStream:
        left = max(1e-3, self._network.clock.left(timeout))
        return _Stream(self._stream.start_tls(ssl_context, server_hostname, left), self._network)

    def close(self) -> None:
        self._stream.close()

    def get_extra_info(self, info: str) -> Any:  # noqa: ANN401 - as httpcore has it
        return self._stream.get_extra_info(info)
