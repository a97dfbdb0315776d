"""A server on loopback that speaks what ProbeLog uses of Google Cloud Storage's XML API.

No package brings one: the emulators know the JSON API, and obstore and LanceDB speak the other. What it answers follows
Google's description of the API: generations, preconditions on them (412), ranges, listings in pages.
"""

from __future__ import annotations

import email.utils
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import ClassVar, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

from tests.support.processes.s3 import at


class Version(NamedTuple):
    data: bytes
    generation: int
    written: float


class GoogleServer(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, bucket: str) -> None:
        super().__init__(("127.0.0.1", 0), _Answers)
        self.bucket = bucket
        self.objects: dict[str, Version] = {}
        self.guard = threading.Lock()
        self.generations = count(int(time.time() * 1e6))
        #: Statuses to answer the next puts with, instead of doing them.
        self.refusals: list[int] = []


class _Answers(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: GoogleServer
    page: ClassVar[int] = 1000

    def log_message(self, *_: object) -> None:
        pass

    def _asked(self) -> tuple[str, str, dict[str, str]]:
        split = urlsplit(self.path)
        _, bucket, *name = split.path.split("/", 2)
        asked = {key: values[0] for key, values in parse_qs(split.query, keep_blank_values=True).items()}
        return unquote(bucket), unquote("".join(name)), asked

    def _answer(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _refuse(self, status: int, code: str) -> None:
        self._answer(status, f"<?xml version='1.0'?><Error><Code>{code}</Code></Error>".encode())

    def do_PUT(self) -> None:
        bucket, name, _ = self._asked()
        data = self.rfile.read(int(self.headers["Content-Length"]))
        wanted = self.headers.get("x-goog-if-generation-match")
        if bucket != self.server.bucket:
            return self._refuse(404, "NoSuchBucket")
        with self.server.guard:
            if self.server.refusals:
                return self._refuse(self.server.refusals.pop(0), "Refused")
            present = self.server.objects.get(name)
            if wanted is not None and int(wanted) != (present.generation if present else 0):
                return self._refuse(412, "PreconditionFailed")
            version = Version(data, next(self.server.generations), time.time())
            self.server.objects[name] = version
        return self._answer(200, headers=_marks(version))

    def do_GET(self) -> None:
        bucket, name, asked = self._asked()
        if bucket != self.server.bucket:
            return self._refuse(404, "NoSuchBucket")
        if not name:
            return self._answer(200, self._listing(asked))
        version = self.server.objects.get(name)
        if version is None:
            return self._refuse(404, "NoSuchKey")
        headers, size = _marks(version), len(version.data)
        if (span := self.headers.get("Range")) is None:
            return self._answer(200, version.data, headers)
        first, last = span.removeprefix("bytes=").split("-")
        start = int(first) if first else max(0, size - int(last))
        end = min(int(last) + 1, size) if first and last else size
        if start >= size:
            return self._refuse(416, "InvalidRange")
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
        return self._answer(206, version.data[start:end], headers)

    def do_HEAD(self) -> None:
        bucket, name, _ = self._asked()
        version = self.server.objects.get(name) if bucket == self.server.bucket else None
        if version is None:
            return self._answer(404)
        return self._answer(200, headers={**_marks(version), "Content-Length": str(len(version.data))})

    def do_DELETE(self) -> None:
        with self.server.guard:
            gone = self.server.objects.pop(self._asked()[1], None)
        return self._refuse(404, "NoSuchKey") if gone is None else self._answer(204)

    def _listing(self, asked: dict[str, str]) -> bytes:
        prefix, delimiter = asked.get("prefix", ""), asked.get("delimiter", "")
        after = asked.get("continuation-token") or asked.get("start-after", "")
        most = min(int(asked.get("max-keys", self.page)), self.page)
        folders, entries, last = set[str](), list[str](), ""
        with self.server.guard:
            objects = dict(self.server.objects)
        truncated = False
        for name in sorted(objects):
            if not name.startswith(prefix) or name <= after:
                continue
            if len(entries) + len(folders) == most:
                truncated = True
                break
            last, rest = name, name[len(prefix) :]
            if delimiter and delimiter in rest:
                folders.add(prefix + rest.split(delimiter)[0] + delimiter)
                continue
            version = objects[name]
            written = datetime.fromtimestamp(version.written, UTC).isoformat(timespec="milliseconds")
            entries.append(
                f"<Contents><Key>{escape(name)}</Key><Generation>{version.generation}</Generation>"
                f"<LastModified>{written.replace('+00:00', 'Z')}</LastModified>"
                f'<ETag>"{version.generation}"</ETag><Size>{len(version.data)}</Size></Contents>'
            )
        common = "".join(
            f"<CommonPrefixes><Prefix>{escape(name)}</Prefix></CommonPrefixes>" for name in sorted(folders)
        )
        more = f"<NextContinuationToken>{escape(last)}</NextContinuationToken>" if truncated else ""
        body = "".join(entries) + common + more
        return f"<?xml version='1.0'?><ListBucketResult>{body}</ListBucketResult>".encode()


def _marks(version: Version) -> dict[str, str]:
    return {
        "ETag": f'"{version.generation}"',
        "x-goog-generation": str(version.generation),
        "Last-Modified": email.utils.formatdate(version.written, usegmt=True),
    }


@contextmanager
def google_server(bucket: str = "probelog-test") -> Iterator[tuple[str, GoogleServer]]:
    """Runs it, with this process's own environment pointing at it; yields the bucket's address and the server."""
    server = GoogleServer(bucket)
    endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    account = {
        "gcs_base_url": endpoint, "disable_oauth": True,
        "client_email": "", "private_key": "", "private_key_id": "",
    }  # fmt: skip
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    with TemporaryDirectory(prefix="google-") as folder:
        file = Path(folder) / "account.json"
        file.write_text(json.dumps(account))
        try:
            with at({"GOOGLE_SERVICE_ACCOUNT": str(file), "GOOGLE_BASE_URL": endpoint}):
                yield f"gs://{bucket}", server
        finally:
            server.shutdown()
            server.server_close()
