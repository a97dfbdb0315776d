"""The part of the Hub's HTTP protocol that clients use to list and download models, over a folder.

Read off huggingface_hub 2.4: paths, parameters, pagination through ``Link`` and the ``X-Error-Code`` header from
which the library makes its exceptions.
"""

from __future__ import annotations

import base64
import binascii
import ipaddress
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote, unquote, urlencode

from starlette.applications import Starlette
from starlette.datastructures import QueryParams
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, RedirectResponse, Response
from starlette.routing import Route

from pipelines.hubserver.folder import (
    HubFile,
    HubFolder,
    Repository,
    git_blob,
    library,
    metadata,
    pipeline_tag,
    pointer,
    tags,
)
from probelog.hub.huggingface import listing_properties

_PAGE = 1000
_BRIEF = (
    "id",
    "modelId",
    "createdAt",
    "private",
    "downloads",
    "likes",
    "library_name",
    "pipeline_tag",
    "tags",
)
_FULL = (*_BRIEF, "author", "sha", "lastModified", "gated", "disabled", "siblings")
_INFO = (*_FULL, "cardData", "config", "safetensors", "usedStorage")
_SORTS: dict[str, Callable[[Repository], Any]] = {
    "lastModified": lambda repository: repository.last_modified,
    "createdAt": lambda repository: repository.created_at,
    "downloads": lambda repository: repository.listed.get("downloads") or 0,
    "likes": lambda repository: repository.listed.get("likes") or 0,
    "trendingScore": lambda repository: repository.listed.get("trendingScore") or 0,
}


class _Refusal(Exception):  # noqa: N818 - an answer, not an error of this program
    def __init__(self, status: int, code: str | None, message: str) -> None:
        self.status, self.code, self.message = status, code, message
        super().__init__(message)


def create_app(root: Path, address: str | None = None, host: str | None = None) -> Starlette:
    """The Hub over a folder, as an ASGI application.

    Args:
        root: the folder.
        address: what clients reach it by, where that is not where it listens (a proxy, a service's name).
        host: the name or address that it was told to listen on.

    Gated and disabled repositories are listed and answer 403 when a file is asked for, private ones are not listed
    and answer 401; there are no accounts.

    Raises:
        UsageError: the folder is missing or empty, or its ``hub.json`` is malformed.
    """
    hub = _Hub(HubFolder(root), address, host)
    return Starlette(
        routes=[
            Route("/api/models", hub.models),
            Route("/api/models/{rest:path}", hub.model),
            Route("/{rest:path}", hub.file),
        ],
        exception_handlers={_Refusal: _refuse, _Moved: _lead_on},
    )


def _refuse(request: Request, error: Exception) -> Response:
    assert isinstance(error, _Refusal)
    # Messages may echo the request; a header is one line of ASCII.
    headers = {"X-Error-Message": re.sub(r"[^ -~]", "?", error.message)[:200]}
    if error.code:
        headers["X-Error-Code"] = error.code
    return JSONResponse({"error": error.message}, status_code=error.status, headers=headers)


class _Moved(Exception):  # noqa: N818 - likewise
    """A repository that has another name now."""

    def __init__(self, old: str, new: str) -> None:
        self.old, self.new = old, new


def _lead_on(request: Request, error: Exception) -> Response:
    """To the same address under the new name. Relative, as the Hub's is: clients follow no other."""
    assert isinstance(error, _Moved)
    path = request.scope["raw_path"].decode("ascii", "replace")
    head = "/api/models/" if path.startswith("/api/models/") else "/"
    rest = path[len(head) + len(quote(error.old)) :] if path.startswith(head + quote(error.old)) else ""
    query = (
        f"?{request.scope['query_string'].decode('ascii', 'replace')}"
        if request.scope["query_string"]
        else ""
    )
    return RedirectResponse(f"{head}{quote(error.new)}{rest}{query}", 307)


class _Hub:
    """The endpoints. Plain functions: Starlette runs them in threads, and what they do is read the disk."""

    def __init__(self, folder: HubFolder, address: str | None, host: str | None) -> None:
        self.folder = folder
        self._address = address.rstrip("/") if address else None
        self._names = {"localhost", socket.gethostname(), host}
        self._lock = threading.Lock()
        self._scanned_at = 0.0
        self._scan: dict[str, Repository] = {}

    # Listing

    def models(self, request: Request) -> Response:
        query = request.query_params
        sort = query.get("sort") or "trendingScore"
        if sort not in _SORTS:
            raise _Refusal(400, None, f"sort must be one of {', '.join(_SORTS)}")
        ascending = query.get("direction") == "1"
        fields = _expanded_fields(query)
        limit = min(_number(query, "limit") or _PAGE, _PAGE)

        key = _SORTS[sort]
        rows = sorted(self._repositories(query), key=lambda repository: repository.id)
        rows.sort(key=key, reverse=not ascending)  # stable: equal keys stay in the order of their ids
        if cursor := query.get("cursor"):
            last_key, last_id = _read_cursor(cursor, type(key(rows[0])) if rows else str)
            rows = [row for row in rows if _is_after(key(row), row.id, last_key, last_id, ascending)]

        headers = {}
        if len(rows) > limit:
            rows = rows[:limit]
            following = _cursor(key(rows[-1]), rows[-1].id)
            headers["Link"] = self._link_to_next(request, following)
        return JSONResponse([metadata(self.folder, row, fields) for row in rows], headers=headers)

    def _repositories(self, query: QueryParams) -> Iterable[Repository]:
        filters = {name for value in query.getlist("filter") for name in value.split(",") if name}
        filters |= set(query.getlist("library"))
        author, search = query.get("author"), (query.get("search") or "").lower()
        task, gated = query.get("pipeline_tag"), query.get("gated")
        for repository in self._scanned(fresh="cursor" not in query):
            if (
                not repository.private
                and (not author or repository.id.startswith(f"{author}/"))
                and search in repository.id.lower()
                and (gated is None or bool(repository.gated) == (gated.lower() == "true"))
                and (not task or pipeline_tag(self.folder, repository) == task)
                and (
                    not filters
                    or filters <= {*tags(self.folder, repository), library(self.folder, repository)}
                )
            ):
                yield repository

    def _scanned(self, fresh: bool) -> list[Repository]:
        # The first page looks at the disk; those that follow may use a look that is some seconds old, or a
        # listing of many small pages would spend its time in scandir.
        with self._lock:
            if fresh or time.monotonic() - self._scanned_at > 5:
                self._scan = self.folder.repositories()
                self._scanned_at = time.monotonic()
            return list(self._scan.values())

    # One repository

    def model(self, request: Request) -> Response:
        name, rest = self._split(_segments(request)[2:], ("revision", "tree", "auth-check"))
        repository = self._repository(name)
        match rest:
            case []:
                return self._info(request, repository)
            case ["revision", revision]:
                self._check_revision(repository, revision)
                return self._info(request, repository)
            case ["tree", revision, *path]:
                self._check_revision(repository, revision)
                return self._tree(request, repository, "/".join(path))
            case ["auth-check"]:
                self._check_access(repository)
                return JSONResponse({})
        raise _Refusal(404, None, "no such address")

    def _info(self, request: Request, repository: Repository) -> Response:
        expand = request.query_params.getlist("expand")
        row = metadata(self.folder, repository, _checked(["id", *expand]) if expand else _INFO)
        if not expand:
            row |= {key: value for key, value in repository.listed.items() if key not in row}
        if _flag(request.query_params, "blobs"):
            row["siblings"] = [self._sibling(file) for file in repository.files.values()]
        return JSONResponse(row)

    def _tree(self, request: Request, repository: Repository, folder: str) -> Response:
        prefix = f"{folder.strip('/')}/" if folder.strip("/") else ""
        entries: dict[str, dict[str, Any]] = {}
        recursive = _flag(request.query_params, "recursive")
        for path, file in repository.files.items():
            if not path.startswith(prefix):
                continue
            parts = path.removeprefix(prefix).split("/")
            for depth in range(1, len(parts)) if recursive else range(1, min(2, len(parts))):
                inner = prefix + "/".join(parts[:depth])
                entries.setdefault(
                    inner, {"type": "directory", "oid": git_blob(inner.encode()), "size": 0, "path": inner}
                )
            if recursive or len(parts) == 1:
                entries[path] = self._entry(file)
        if prefix and not entries:
            raise _Refusal(404, "EntryNotFound", "Folder not found")
        cursor = request.query_params.get("cursor")
        names = sorted(name for name in entries if not cursor or name > _read_cursor(cursor, str)[1])
        headers = {}
        limit = min(_number(request.query_params, "limit") or _PAGE, _PAGE)
        if len(names) > limit:
            names = names[:limit]
            headers["Link"] = self._link_to_next(request, _cursor("", names[-1]))
        return JSONResponse([entries[name] for name in names], headers=headers)

    def _entry(self, file: HubFile) -> dict[str, Any]:
        digests = self.folder.digests(file)
        entry: dict[str, Any] = {"type": "file", "oid": digests.blob, "size": file.size, "path": file.path}
        if file.is_lfs:
            text = pointer(digests, file.size)
            entry["oid"] = git_blob(text)
            entry["lfs"] = {"oid": digests.sha256, "size": file.size, "pointerSize": len(text)}
        return entry

    def _sibling(self, file: HubFile) -> dict[str, Any]:
        entry = self._entry(file)
        sibling: dict[str, Any] = {"rfilename": file.path, "size": file.size, "blobId": entry["oid"]}
        if "lfs" in entry:
            sibling["lfs"] = {
                "sha256": entry["lfs"]["oid"],
                "size": file.size,
                "pointerSize": entry["lfs"]["pointerSize"],
            }
        return sibling

    # Files

    def file(self, request: Request) -> Response:
        name, rest = self._split(_segments(request), ("resolve",))
        if len(rest) < 3:
            raise _Refusal(404, None, "no such address")
        repository = self._repository(name)
        self._check_access(repository)
        commit = self._check_revision(repository, rest[1])
        path = "/".join(rest[2:])
        # The path is looked up among the files that a scan found inside the folder, never joined to one.
        file = repository.files.get(path)
        if file is None:
            raise _Refusal(404, "EntryNotFound", "Entry not found")
        try:
            status = file.local.stat()
            digests = self.folder.digests(file)
        except FileNotFoundError as error:  # removed since the scan
            raise _Refusal(404, "EntryNotFound", "Entry not found") from error
        headers = {
            "ETag": f'"{digests.sha256 if file.is_lfs else digests.blob}"',
            "X-Repo-Commit": commit,
        }
        return FileResponse(
            file.local, headers=headers, media_type="application/octet-stream", stat_result=status
        )

    # What the endpoints share

    def _link_to_next(self, request: Request, cursor: str) -> str:
        """The ``Link`` header with the next page. Absolute, as clients follow no other."""
        given = [item for item in request.query_params.multi_items() if item[0] != "cursor"]
        path = request.scope["raw_path"].decode("ascii", "replace")
        return f'<{self._address or self._own_address(request)}{path}?{urlencode([*given, ("cursor", cursor)])}>; rel="next"'

    def _own_address(self, request: Request) -> str:
        """Where the request came in: under the name by which the client asked, if that is one of this machine's.

        Another name in ``Host`` is untrusted: whoever caches or passes on the answer would be led there.
        """
        own, port = request.scope["server"]
        match = _HOST.fullmatch(request.headers.get("host", ""))
        if match is not None and (
            match["name"] in {own, *self._names} or _is_loopback(match["name"].strip("[]"))
        ):
            return f"http://{match[0]}"
        return f"http://[{own}]:{port}" if ":" in own else f"http://{own}:{port}"

    def _split(self, segments: list[str], verbs: tuple[str, ...]) -> tuple[str, list[str]]:
        """A repository's id (of one name or two) and what follows it in an address."""
        size = next((n for n in (1, 2) if len(segments) > n and segments[n] in verbs), min(len(segments), 2))
        return "/".join(segments[:size]), segments[size:]

    def _repository(self, name: str) -> Repository:
        repository = self.folder.repository(name)
        if repository is None:
            if (new := self.folder.renamed(name)) is not None:
                raise _Moved(name, new)
            raise _Refusal(404, "RepoNotFound", "Repository not found")
        if repository.private:
            raise _Refusal(401, "RepoNotFound", "Invalid username or password.")
        return repository

    def _check_access(self, repository: Repository) -> None:
        if repository.disabled:
            raise _Refusal(403, None, "Access to this resource is disabled.")
        if repository.gated:
            raise _Refusal(403, "GatedRepo", f"Access to model {repository.id} is restricted.")

    def _check_revision(self, repository: Repository, revision: str) -> str:
        commit = self.folder.sha(repository)
        is_commit = len(revision) >= 7 and commit.startswith(revision)
        if not is_commit and revision not in ("main", "refs/heads/main"):
            raise _Refusal(404, "RevisionNotFound", "Invalid rev id")
        return commit


_HOST = re.compile(r"(?P<name>[\w.-]+|\[[0-9A-Fa-f:.]+\])(?::\d{1,5})?", re.ASCII)


def _is_loopback(name: str) -> bool:
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def _segments(request: Request) -> list[str]:
    """The parts of the address. Split before decoding: a revision such as ``refs/pr/1`` is one part."""
    raw = request.scope.get("raw_path") or request.scope["path"].encode()
    segments = [unquote(part) for part in raw.decode("ascii", "replace").split("/")[1:]]
    if any("\0" in segment for segment in segments):
        raise _Refusal(400, None, "no such address")
    return segments


def _expanded_fields(query: QueryParams) -> list[str]:
    if expand := query.getlist("expand"):
        return _checked(["id", *expand])
    fields = list(_FULL if _flag(query, "full") else _BRIEF)
    return fields + [name for name in ("config", "cardData") if _flag(query, name)]


def _checked(expand: list[str]) -> list[str]:
    known = {"id", *listing_properties()}
    if unknown := [name for name in expand if name not in known]:
        raise _Refusal(400, None, f"expand: unknown property {', '.join(unknown)}")
    return list(dict.fromkeys(expand))


def _flag(query: QueryParams, name: str) -> bool:
    return query.get(name, "").lower() in ("true", "1")


def _number(query: QueryParams, name: str) -> int | None:
    text = query.get(name)
    if text is None:
        return None
    if not text.isascii() or not text.isdigit() or len(text) > 9 or int(text) == 0:
        raise _Refusal(400, None, f"{name} must be a positive whole number")
    return int(text)


def _cursor(key: object, name: str) -> str:
    return base64.urlsafe_b64encode(json.dumps([key, name]).encode()).decode()


def _read_cursor(text: str, kind: type) -> tuple[Any, str]:
    try:
        key, name = json.loads(base64.urlsafe_b64decode(text))
    except (binascii.Error, ValueError, TypeError, RecursionError) as error:
        raise _Refusal(400, None, "Invalid cursor") from error
    if not isinstance(key, kind) or not isinstance(name, str):
        raise _Refusal(400, None, "Invalid cursor")
    return key, name


Key = TypeVar("Key", str, float)
"""What a listing is sorted by."""


def _is_after(key: Key, name: str, last_key: Key, last_name: str, ascending: bool) -> bool:
    if key == last_key:
        return name > last_name
    return bool(key > last_key if ascending else key < last_key)
