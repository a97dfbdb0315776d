"""Just enough of the Hub, on loopback, to hand out one repository ``owner/name`` from a folder."""

from __future__ import annotations

import http.server
import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

SHA = "0" * 40


def environment_for(endpoint: str, home: Path) -> dict[str, str]:
    """For a process of its own: huggingface_hub reads its environment when it is imported."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    return kept | {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}


@contextmanager
def serving(folder: Path, kind: str) -> Iterator[str]:
    """Serve a folder as a repository of a kind (``models`` or ``datasets``); gives the endpoint."""
    handler = type("Handler", (_Repository,), {"folder": folder, "kind": kind})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


class _Repository(http.server.BaseHTTPRequestHandler):
    folder: Path
    kind: str

    def log_message(self, *words: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        wanted = (
            json.loads(body)["paths"]
            if body.startswith("{")
            else [
                path for name, paths in parse_qs(body).items() if name.startswith("paths") for path in paths
            ]
        )
        self.answer(200, json.dumps([row for row in self.tree("") if row["path"] in wanted]).encode())

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        about = f"/api/{self.kind}/owner/name"
        files = f"{'' if self.kind == 'models' else '/datasets'}/owner/name/resolve/"
        if path.startswith(f"{about}/tree/"):
            inside = path.removeprefix(f"{about}/tree/").partition("/")[2]
            return self.answer(200, json.dumps(self.tree(inside)).encode())
        if path.startswith(about):
            siblings = [{"rfilename": row["path"]} for row in self.tree("") if row["type"] == "file"]
            facts = {"id": "owner/name", "sha": SHA, "siblings": siblings}
            return self.answer(200, json.dumps(facts).encode())
        file = self.folder / path.removeprefix(files).partition("/")[2]
        if path.startswith(files) and file.is_file():
            return self.answer(200, file.read_bytes(), file.name)
        return self.answer(404, b"{}", error="RepoNotFound")

    def tree(self, inside: str) -> list[dict[str, Any]]:
        found = []
        for path in sorted((self.folder / inside).rglob("*")):
            name = path.relative_to(self.folder).as_posix()
            kind = "directory" if path.is_dir() else "file"
            found.append({"type": kind, "path": name, "size": path.stat().st_size, "oid": name})
        return found

    def answer(self, status: int, body: bytes, etag: str = "none", error: str | None = None) -> None:
        whole = len(body)
        if status == 200 and (span := self.headers.get("Range", "")).startswith("bytes="):
            first, _, last = span.removeprefix("bytes=").partition("-")
            begin, end = int(first), min(int(last or whole - 1), whole - 1)
            status, body = 206, body[begin : end + 1]
        self.send_response(status)
        if status == 206:
            self.send_header("Content-Range", f"bytes {begin}-{end}/{whole}")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Type", "application/json")
        self.send_header("X-Repo-Commit", SHA)
        self.send_header("ETag", f'"{etag}"')
        if error:
            self.send_header("X-Error-Code", error)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
