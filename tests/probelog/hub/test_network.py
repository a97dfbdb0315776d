"""What connections keep to: clocks, and from where addresses are reached. Real answers are in `tests/redteam/test_hub.py`."""

from __future__ import annotations

import datetime as dt
import socket
import ssl
import threading
from pathlib import Path
from typing import Any

import httpcore
import httpx
import pytest

from probelog.hub import network
from probelog.hub.client import HubClient, HubUnavailableError, Retry
from probelog.hub.network import MAX_HEADER_BYTES, AddressError, Clock, Network, Reach, reach


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("8.8.8.8", Reach.EVERYWHERE),
        ("2606:4700::1", Reach.EVERYWHERE),
        ("64:ff9b::808:808", Reach.EVERYWHERE),
        ("::ffff:8.8.8.8", Reach.EVERYWHERE),
        ("10.1.2.3", Reach.NETWORK),
        ("100.64.0.1", Reach.NETWORK),
        ("fd12::1", Reach.NETWORK),
        ("64:ff9b::a01:203", Reach.NETWORK),
        ("2002:a01:203::", Reach.NETWORK),
        ("127.9.9.9", Reach.MACHINE),
        ("::1", Reach.MACHINE),
        ("::ffff:127.0.0.1", Reach.MACHINE),
        ("fe80::1%1", Reach.NOWHERE),
        ("0.0.0.0", Reach.NOWHERE),
        ("240.0.0.1", Reach.NOWHERE),
        ("::7f00:1", Reach.NOWHERE),
    ],
)
def test_where_addresses_are_reached_from(address: str, expected: Reach) -> None:
    assert reach(address) is expected


@pytest.mark.parametrize("hub", [Reach.EVERYWHERE, Reach.NETWORK, Reach.MACHINE])
def test_a_hub_leads_as_far_as_it_is_away_or_farther(hub: Reach) -> None:
    with httpx.Client() as client:
        guarded = Network(client, httpx.URL("https://hub.example"))
        guarded.hub_reach = hub
        for target in Reach:
            if target <= hub and target is not Reach.NOWHERE:
                guarded.refuse("storage.example", "192.0.2.1", target)
            else:
                with pytest.raises(
                    AddressError, match=r"storage\.example \(192\.0\.2\.1\), an address of a closer"
                ):
                    guarded.refuse("storage.example", "192.0.2.1", target)


@pytest.mark.parametrize(
    ("endpoint", "expected"),
    [
        ("https://hub.example", Reach.EVERYWHERE),
        ("http://10.0.0.1", Reach.NETWORK),
        ("http://[::1]:1", Reach.MACHINE),
    ],
)
def test_where_a_hub_is_as_far_as_its_address_says(endpoint: str, expected: Reach) -> None:
    with httpx.Client() as client:
        assert Network(client, httpx.URL(endpoint)).hub_reach is expected


@pytest.mark.parametrize(
    ("endpoint", "host", "port", "expected"),
    [
        ("https://hub.example", "hub.example", 443, True),
        ("http://hub.example", "hub.example", 80, True),
        ("http://hub.example:81", "hub.example", 81, True),
        ("https://hub.example", "hub.example", 80, False),
        ("https://hub.example", "storage.example", 443, False),
    ],
)
def test_the_hub_is_one_port_of_one_host(endpoint: str, host: str, port: int, expected: bool) -> None:
    with httpx.Client() as client:
        assert Network(client, httpx.URL(endpoint)).is_hub(host, port) is expected


class Pool(httpcore.ConnectionPool):
    """A pool as a later version may have it."""

    def __init__(self) -> None:
        super().__init__()
        del self._network_backend


def test_an_httpx_that_is_not_known_is_refused() -> None:
    """Rather than connect without guards."""
    for pool in (None, object(), Pool()):
        transport = httpx.MockTransport(lambda _: httpx.Response(200))
        transport._pool = pool  # type: ignore[attr-defined]
        with (
            httpx.Client(transport=transport) as client,
            pytest.raises(RuntimeError, match="cannot be guarded"),
        ):
            Network(client, httpx.URL("https://hub.example"))


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    time = [100.0]
    monkeypatch.setattr(network.time, "monotonic", lambda: time[0])
    return time


def test_a_clock_gives_each_part_its_time_within_the_whole(now: list[float]) -> None:
    clock = Clock(10.0, lambda: None)
    assert clock.left(None) == 10.0
    clock.begin_headers(4.0)
    assert clock.left(None) == 4.0
    assert clock.left(1.5) == 1.5
    now[0] += 3.0
    assert clock.left(None) == 1.0
    now[0] += 2.0
    assert clock.left(None) == 0.0
    clock.begin_piece(4.0)
    assert clock.left(None) == 4.0
    now[0] += 2.0
    clock.begin_piece(4.0)
    assert clock.left(None) == 3.0


def test_headers_have_a_size_and_bodies_have_not() -> None:
    clock = Clock(10.0, lambda: None)
    clock.count(10 * MAX_HEADER_BYTES)
    clock.begin_headers(1.0)
    assert not clock.answered
    clock.count(MAX_HEADER_BYTES)
    assert clock.answered
    with pytest.raises(httpcore.RemoteProtocolError, match="more than 512 KiB of headers"):
        clock.count(1)
    clock.begin_piece(1.0)
    clock.count(10 * MAX_HEADER_BYTES)


def test_every_thread_has_its_own_clock() -> None:
    with httpx.Client() as client:
        guarded = Network(client, httpx.URL("https://hub.example"))
        clocks = [Clock(10.0, lambda: None), Clock(10.0, lambda: None)]
        seen: list[Clock] = []

        def other() -> None:
            with guarded.request(clocks[1]):
                seen.append(guarded.clock)

        with guarded.request(clocks[0]):
            thread = threading.Thread(target=other)
            thread.start()
            thread.join()
            assert guarded.clock is clocks[0]
        assert seen == [clocks[1]]
        assert guarded.clock not in clocks


def certificate(folder: Path, name: str) -> Path:
    """A certificate that signs itself, with its key, in one file."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key, now = ec.generate_private_key(ec.SECP256R1()), dt.datetime.now(dt.UTC)
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    made = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - dt.timedelta(days=1))
        .not_valid_after(now + dt.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    path = folder / "certificate.pem"
    pem = serialization.Encoding.PEM
    path.write_bytes(
        key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        + made.public_bytes(pem)
    )
    return path


@pytest.mark.parametrize("silent", [False, True], ids=["sound", "silent-after-the-handshake"])
def test_encrypted_connections_are_guarded_too(
    silent: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = certificate(tmp_path, "hub.example")
    monkeypatch.setenv("SSL_CERT_FILE", str(path))
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "hub.example")
    true = socket.getaddrinfo

    def lookup(host: str, *arguments: Any, **options: Any) -> Any:
        return true("127.0.0.1" if host == "hub.example" else host, *arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", lookup)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(path)
    done = threading.Event()
    listening = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        connection, _ = listening.accept()
        with context.wrap_socket(connection, server_side=True) as stream:
            stream.recv(65536)
            if silent:
                done.wait(60)
            else:
                stream.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n[]")

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    retry = Retry(attempts=1, connect_timeout=30.0, read_timeout=0.2 if silent else 30.0)
    with listening, HubClient(f"https://hub.example:{listening.getsockname()[1]}", retry=retry) as client:
        if silent:
            with pytest.raises(HubUnavailableError, match="in time"):
                client.json("/api/models")
        else:
            assert client.json("/api/models").value == []
        assert client._network.hub_reach is Reach.MACHINE
    done.set()
    thread.join()
