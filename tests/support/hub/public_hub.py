"""The public Hub's answers, rebuilt: the Hub and its storage as two hosts, over repositories of every kind that it holds.

The shapes (fields, headers, redirects, refusals) are those of docs/hub-answers.md, which names where each one is
documented; the repositories and their contents are made up here. `tests.support.hub.faults` wraps both hosts: their
answers can be spoiled, and what they were asked is kept.
"""

from __future__ import annotations

import base64
import contextlib
import gzip
import hashlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote, urlencode

import numpy as np
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from pipelines.hubserver import serving
from tests.support.hub.faults import FaultyHub

#: Of a user who may read the gated repositories and the private one, and of one who may read neither.
MEMBER, OUTSIDER = "hf_member", "hf_outsider"
DISABLED = "Access to this resource is disabled."
BAD_TOKEN = "Invalid credentials in Authorization header"
RATE_LIMIT = {
    "api": {"RateLimit": '"api";r=489;t=189', "RateLimit-Policy": '"fixed window";"api";q=500;w=300'},
    "resolvers": {
        "RateLimit": '"resolvers";r=2997;t=258',
        "RateLimit-Policy": '"fixed window";"resolvers";q=3000;w=300',
    },
}
_EXPOSED = (
    "X-Repo-Commit,X-Request-Id,X-Error-Code,X-Error-Message,X-Total-Count,ETag,Link,Accept-Ranges,"
    "Content-Range,X-Linked-Size,X-Linked-ETag,X-Xet-Hash"
)
_TREE_PAGE = 3


@dataclass(frozen=True)
class HostedFile:
    """A file in git, in Git LFS, or (as nearly all large ones today) in Xet, which keeps the fields of LFS."""

    content: bytes
    storage: Literal["git", "lfs", "xet"] = "git"

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def pointer(self) -> bytes:
        return (
            f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.content)}\n"
        ).encode()

    @property
    def oid(self) -> str:
        """The name of the blob in git: of the content, or of the pointer that stands for it."""
        blob = self.content if self.storage == "git" else self.pointer
        return hashlib.sha1(b"blob %d\0" % len(blob) + blob, usedforsecurity=False).hexdigest()

    @property
    def xet_hash(self) -> str:
        """Another digest of 64 digits, which is not the file's SHA-256."""
        return hashlib.sha256(b"xet" + self.content).hexdigest()

    @property
    def storage_etag(self) -> str:
        return f'"{self.xet_hash}"' if self.storage == "xet" else f'"{self.oid[:32]}-2"'

    def tree_entry(self, path: str) -> dict[str, Any]:
        entry: dict[str, Any] = {"type": "file", "oid": self.oid, "size": len(self.content)}
        if self.storage != "git":
            entry["lfs"] = {
                "oid": self.sha256,
                "size": len(self.content),
                "pointerSize": len(self.pointer),
            }
        if self.storage == "xet":
            entry["xetHash"] = self.xet_hash
        return {**entry, "path": path}

    def sibling(self, path: str) -> dict[str, Any]:
        entry: dict[str, Any] = {"rfilename": path, "blobId": self.oid, "size": len(self.content)}
        if self.storage != "git":
            entry["lfs"] = {
                "sha256": self.sha256,
                "size": len(self.content),
                "pointerSize": len(self.pointer),
            }
        return entry


@dataclass
class HostedRepository:
    """``facts`` are fields of the listing; a field that the Hub does not know is left out, as there."""

    id: str
    files: dict[str, HostedFile]
    gated: Literal[False, "auto", "manual"] = False
    disabled: bool = False
    private: bool = False
    formerly: tuple[str, ...] = ()
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def sha(self) -> str:
        return hashlib.sha1(self.id.encode(), usedforsecurity=False).hexdigest()

    @property
    def internal_id(self) -> str:
        return hashlib.sha1(b"_id" + self.id.encode(), usedforsecurity=False).hexdigest()[:24]

    def listing(self) -> dict[str, Any]:
        """Every field that a listing may be asked for and that this repository has."""
        return {
            "author": self.id.rpartition("/")[0],
            "private": self.private,
            "gated": self.gated,
            "disabled": self.disabled,
            "sha": self.sha,
            "lastModified": "2026-04-29T16:31:26.000Z",
            "createdAt": "2022-03-02T23:29:04.000Z",
            "downloads": 1234,
            "likes": 5,
            "siblings": [{"rfilename": path} for path in self.files],
            "usedStorage": sum(len(file.content) for file in self.files.values()),
            **self.facts,
        }


def tensors(seed: int, values: int) -> bytes:
    """A safetensors file."""
    from safetensors.numpy import save

    return save({"classifier.weight": np.random.default_rng(seed).normal(size=values).astype(np.float32)})


def _json(value: object) -> HostedFile:
    return HostedFile(json.dumps(value).encode())


_GIT = {
    ".gitattributes": HostedFile(b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"),
    "README.md": HostedFile(b"---\nlicense: apache-2.0\n---\n# A model\n"),
}
_VIT = _json({"architectures": ["ViTForImageClassification"], "model_type": "vit"})
_SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
_TAGS = ["transformers", "safetensors", "vit", "image-classification", "license:apache-2.0", "region:us"]


def _vit(seed: int, storage: Literal["lfs", "xet"] = "xet") -> dict[str, HostedFile]:
    weights = HostedFile(tensors(seed, 3000), storage)
    processor = _json({"image_processor_type": "ViTImageProcessor", "size": {"height": 8, "width": 8}})
    return {
        **_GIT,
        "config.json": _VIT,
        "model.safetensors": weights,
        "preprocessor_config.json": processor,
    }


def _facts(**more: Any) -> dict[str, Any]:
    """What the Hub says about a classifier of transformers; its ``config`` is an excerpt without the labels."""
    return {
        "library_name": "transformers",
        "pipeline_tag": "image-classification",
        "tags": _TAGS,
        "config": {"architectures": ["ViTForImageClassification"], "model_type": "vit"},
        "cardData": {"license": "apache-2.0", "tags": ["vision"], "datasets": ["imagenet-1k"]},
        "transformersInfo": {
            "auto_model": "AutoModelForImageClassification",
            "pipeline_tag": "image-classification",
            "processor": "AutoImageProcessor",
        },
        "safetensors": {"parameters": {"F32": 3000}, "total": 3000},
        **more,
    }


def repositories() -> list[HostedRepository]:
    """Those that a crawl meets. All are listed but the private one, which its members alone see."""
    shards = {name: HostedFile(tensors(seed, 500), "lfs") for seed, name in enumerate(_SHARDS, 10)}
    index = {
        "metadata": {"total_size": 4000},
        "weight_map": {"a": _SHARDS[0], "b": _SHARDS[1]},
    }
    timm_card = {
        "tags": ["image-classification", "timm"],
        "library_name": "timm",
        "license": "apache-2.0",
        "datasets": ["imagenet-1k"],
    }
    return [
        HostedRepository("lab/vit-tiny", {**_vit(1), "runs/events.1": HostedFile(b"e"), "runs/old/events.0": HostedFile(b"f")}, facts=_facts()),
        HostedRepository("lab/sharded", {**_GIT, "config.json": _VIT, **shards, "model.safetensors.index.json": _json(index)}, facts=_facts()),
        HostedRepository(
            "timm-lab/resnet18.a1_in1k",
            {**_GIT, "config.json": _json({"architecture": "resnet18", "num_classes": 3}), "model.safetensors": HostedFile(tensors(3, 700), "xet"), "pytorch_model.bin": HostedFile(b"PK\3\4", "lfs")},
            facts=_facts(library_name="timm", tags=["timm", "pytorch", "safetensors", "image-classification", "transformers", "arxiv:2110.00476", "license:apache-2.0", "region:us"], cardData=timm_card, config={"architecture": "resnet18"}),
        ),
        HostedRepository("lab/gated-auto", _vit(4), gated="auto", facts=_facts()),
        HostedRepository("lab/gated-manual", _vit(5), gated="manual", facts=_facts()),
        HostedRepository("lab/taken-down", _vit(6), disabled=True, facts=_facts()),
        HostedRepository("lab/vit-renamed", _vit(7), formerly=("old-lab/vit", "vit-without-owner"), facts=_facts()),
        HostedRepository("lab/vit-private", _vit(8), private=True, facts=_facts()),
        HostedRepository("lab/empty-card", {**_vit(9, "lfs"), "processor_config.json": HostedFile(b"")}),
    ]  # fmt: skip


@dataclass
class PublicHub:
    """Both hosts.

    ``location`` says where a large file's redirect leads: to the storage, or (as mirrors that store files themselves
    do) elsewhere on the Hub's host, where in place of the redirect the last answer says what the file is.
    """

    repositories: list[HostedRepository] = field(default_factory=repositories)
    location: Literal["storage", "storage without scheme", "mirror", "mirror without host"] = "storage"
    endpoint: str = ""
    storage_endpoint: str = ""

    def __post_init__(self) -> None:
        methods = ["GET", "HEAD"]
        self.hub = FaultyHub(Starlette(routes=[Route("/{path:path}", self._hub, methods=methods)]))
        self.storage = FaultyHub(Starlette(routes=[Route("/{path:path}", self._stored, methods=methods)]))

    def find(self, name: str) -> HostedRepository:
        return next(repository for repository in self.repositories if repository.id == name)

    # The Hub

    async def _hub(self, request: Request) -> Response:
        path = request.url.path
        if path.startswith("/xet-bridge-us/"):
            return self._object(request, self._described)
        api = path.startswith("/api/") and not path.startswith("/api/resolve-cache/")
        response = self._refused_token(request) or self._answer(request, path)
        response.headers["X-Powered-By"] = "huggingface-moon"
        response.headers["X-Request-Id"] = "Root=1-69f2325e-620262f97b6b75d06f0de3f2"
        response.headers["Access-Control-Expose-Headers"] = _EXPOSED
        response.headers.update(RATE_LIMIT["api" if api else "resolvers"])
        if api and response.status_code == 200 and "gzip" in request.headers.get("accept-encoding", ""):
            response.body = gzip.compress(bytes(response.body))
            response.headers["Content-Encoding"] = "gzip"
            response.headers["Content-Length"] = str(len(response.body))
        return response

    def _answer(self, request: Request, path: str) -> Response:
        if path == "/api/models":
            return self._models(request)
        routes: list[tuple[str, Callable[..., Response]]] = [
            (r"/api/resolve-cache/models/(?P<name>.+)/(?P<revision>[0-9a-f]{40})/(?P<file>.+)", self._cached),
            (r"/api/models/(?P<name>.+?)/tree/(?P<revision>[^/]+)(?:/(?P<folder>.*))?", self._tree),
            (r"/api/models/(?P<name>.+?)/revision/(?P<revision>[^/]+)", self._info),
            (r"/api/models/(?P<name>.+)", self._info),
            (r"/(?P<name>.+?)/resolve/(?P<revision>[^/]+)/(?P<file>.+)", self._resolve),
        ]
        for pattern, answer in routes:
            if match := re.fullmatch(pattern, path):
                found = match.groupdict()
                return self._repository(request, found.pop("name"), answer, **found)
        return _refusal(404, None, "Sorry, we can't find the page you are looking for.")

    def _refused_token(self, request: Request) -> Response | None:
        said = request.headers.get("authorization")
        if said in (None, f"Bearer {MEMBER}", f"Bearer {OUTSIDER}"):
            return None
        return _refusal(401, None, BAD_TOKEN)

    def _repository(
        self, request: Request, name: str, answer: Callable[..., Response], **found: Any
    ) -> Response:
        """Who may see a repository, and where it is now; then what was asked of it."""
        token = request.headers.get("authorization", "").removeprefix("Bearer ")
        for repository in self.repositories:
            if name in repository.formerly:
                return self._moved(request, name, repository)
            if repository.id != name or (repository.private and token != MEMBER):
                continue
            if repository.disabled:
                return _refusal(403, None, DISABLED)
            return answer(request, repository, **found)
        if token:
            return _refusal(404, "RepoNotFound", "Repository not found")
        # Nobody is told whether it is private or does not exist.
        return _refusal(401, None, "Invalid username or password.")

    def _moved(self, request: Request, name: str, repository: HostedRepository) -> Response:
        target = request.url.path.replace(name, repository.id, 1)
        query = f"?{request.url.query}" if request.url.query else ""
        return Response(
            f"Temporary Redirect. Redirecting to {target}",
            307,
            {"Location": target + query},
            "text/plain; charset=utf-8",
        )

    def _models(self, request: Request) -> Response:
        query = request.query_params
        listed = [
            repository
            for repository in self.repositories
            if not repository.private
            and repository.id.startswith(query.get("author", ""))
            and query.get("pipeline_tag") in (None, repository.facts.get("pipeline_tag"))
            and all(tag in repository.facts.get("tags", ()) for tag in query.getlist("filter"))
        ]
        start = json.loads(base64.b64decode(query["cursor"]))["$skip"] if "cursor" in query else 0
        end = start + int(query.get("limit", 1000))
        wanted = query.getlist("expand")
        rows = []
        for repository in listed[start:end]:
            facts = repository.listing()
            row = {"_id": repository.internal_id, "id": repository.id}
            rows.append(row | {name: facts[name] for name in wanted if name in facts})
        response = JSONResponse(rows)
        if end < len(listed):
            cursor = base64.b64encode(json.dumps({"$skip": end}).encode()).decode()
            following = [(name, value) for name, value in query.multi_items() if name != "cursor"]
            address = f"{self.endpoint}/api/models?{urlencode([*following, ('cursor', cursor)])}"
            response.headers["Link"] = f'<{address}>; rel="next"'
        return response

    def _info(self, request: Request, repository: HostedRepository, revision: str = "main") -> Response:
        if refused := _unknown_revision(repository, revision):
            return refused
        page = repository.listing()
        if request.query_params.get("blobs", "").lower() in ("true", "1"):
            page["siblings"] = [file.sibling(path) for path, file in repository.files.items()]
        return JSONResponse(
            {
                "_id": repository.internal_id,
                "id": repository.id,
                "modelId": repository.id,
                "model-index": None,
                "spaces": [],
                "widgetData": [],
                **page,
            }
        )

    def _tree(
        self, request: Request, repository: HostedRepository, revision: str, folder: str | None
    ) -> Response:
        if refused := _unknown_revision(repository, revision):
            return refused
        prefix = f"{folder}/" if folder else ""
        recursive = request.query_params.get("recursive", "").lower() in ("true", "1")
        entries: dict[str, dict[str, Any]] = {}
        for path, file in repository.files.items():
            if not path.startswith(prefix):
                continue
            parts = path.removeprefix(prefix).split("/")
            for depth in range(1, len(parts) if recursive else min(2, len(parts))):
                inner = prefix + "/".join(parts[:depth])
                oid = hashlib.sha1(inner.encode(), usedforsecurity=False).hexdigest()
                entries[inner] = {"type": "directory", "oid": oid, "size": 0, "path": inner}
            if recursive or len(parts) == 1:
                entries[path] = file.tree_entry(path)
        start = int(request.query_params.get("cursor", "0"))
        page = list(entries.values())[start : start + _TREE_PAGE]
        response = JSONResponse(page)
        if start + _TREE_PAGE < len(entries):
            query = {**request.query_params, "cursor": str(start + _TREE_PAGE)}
            address = f"{self.endpoint}{request.url.path}?{urlencode(query)}"
            response.headers["Link"] = f'<{address}>; rel="next"'
        return response

    def _resolve(self, request: Request, repository: HostedRepository, revision: str, file: str) -> Response:
        token = request.headers.get("authorization")
        if repository.gated and token != f"Bearer {MEMBER}":
            said = f"Access to model {repository.id} is restricted"
            if token:
                ask = f"Visit {self.endpoint}/{repository.id} to ask for access."
                return _refusal(403, "GatedRepo", f"{said} and you are not in the authorized list. {ask}")
            return _refusal(
                401,
                "GatedRepo",
                f"{said}. You must have access to it and be authenticated to access it. Please log in.",
            )
        if refused := _unknown_revision(repository, revision):
            return refused
        commit = {"X-Repo-Commit": repository.sha, "Accept-Ranges": "bytes"}
        hosted = repository.files.get(file)
        if hosted is None:
            response = _refusal(404, "EntryNotFound", "Entry not found")
            response.headers.update(commit)
            return response
        if hosted.storage != "git":
            return self._to_storage(repository, hosted)
        shared = not (repository.private or repository.gated) and hosted.content
        if not shared:  # by the Hub itself
            return _content(request, hosted.content, f'"{hosted.oid}"', commit)
        target = f"/api/resolve-cache/models/{repository.id}/{repository.sha}/{quote(file)}"
        location = (
            f"{target}?{quote(request.url.path, safe='')}=&etag={quote(chr(34) + hosted.oid + chr(34))}"
        )
        headers = commit | {"Location": location, "Vary": "Origin, Accept"}
        if file != "config.json":  # on some answers
            headers |= {"X-Linked-Size": str(len(hosted.content)), "X-Linked-ETag": f'"{hosted.oid}"'}
        return Response(
            f"Temporary Redirect. Redirecting to {target}", 307, headers, "text/plain; charset=utf-8"
        )

    def _to_storage(self, repository: HostedRepository, file: HostedFile) -> Response:
        name = file.xet_hash if file.storage == "xet" else file.sha256
        signed = {
            "X-Amz-Algorithm": "AWS4-HMAC-SHA256",
            "X-Amz-Credential": "cas/20260409/us-east-1/s3/aws4_request",
            "X-Amz-Expires": "3600",
            "X-Amz-Signature": hashlib.sha256(name.encode()).hexdigest(),
            "X-Amz-SignedHeaders": "host",
            "X-Xet-Cas-Uid": "public",
        }
        start = {
            "storage": self.storage_endpoint,
            "storage without scheme": self.storage_endpoint.removeprefix("http:"),
            "mirror": self.endpoint,
            "mirror without host": "",
        }[self.location]
        location = f"{start}/xet-bridge-us/{repository.internal_id}/{name}?{urlencode(signed)}"
        said = {} if self.location.startswith("mirror") else self._described(repository, file)
        return Response(
            f"Found. Redirecting to {location}",
            302,
            said | {"Location": location},
            "text/plain; charset=utf-8",
        )

    def _described(self, repository: HostedRepository, file: HostedFile) -> dict[str, str]:
        headers = {
            "X-Repo-Commit": repository.sha,
            "X-Linked-Size": str(len(file.content)),
            "X-Linked-ETag": f'"{file.sha256}"',
        }
        if file.storage == "xet":
            token = f"{self.endpoint}/api/models/{repository.id}/xet-read-token/{repository.sha}"
            reconstruction = f"{self.storage_endpoint}/v1/reconstructions/{file.xet_hash}"
            headers["X-Xet-Hash"] = file.xet_hash
            headers["Link"] = f'<{token}>; rel="xet-auth", <{reconstruction}>; rel="xet-reconstruction-info"'
        return headers

    def _cached(self, request: Request, repository: HostedRepository, revision: str, file: str) -> Response:
        """What the Hub's cache answers for a small file."""
        hosted = repository.files[file]
        headers = {"X-Repo-Commit": revision, "X-Hub-Cache": "HIT"}
        return _content(request, hosted.content, f'"{hosted.oid}"', headers, "text/plain; charset=utf-8")

    # The storage

    async def _stored(self, request: Request) -> Response:
        if "authorization" in request.headers:
            return storage_error(400, "InvalidArgument", "Only one auth mechanism allowed")
        return self._object(request)

    def _object(self, request: Request, described: Callable[..., dict[str, str]] = lambda *_: {}) -> Response:
        name = request.url.path.rpartition("/")[2]
        if "X-Amz-Signature" not in request.query_params:
            return storage_error(403, "AccessDenied", "Access Denied")
        for repository in self.repositories:
            for file in repository.files.values():
                if name in (file.xet_hash, file.sha256) and file.storage != "git":
                    return _content(request, file.content, file.storage_etag, described(repository, file))
        return storage_error(404, "NoSuchKey", "The specified key does not exist.")


def storage_error(status: int, code: str, message: str) -> Response:
    """A refusal of the storage, in its own form."""
    body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{message}</Message></Error>"
    return Response(body, status, media_type="application/xml")


def _refusal(status: int, code: str | None, message: str) -> Response:
    headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
    if status == 401:
        headers["WWW-Authenticate"] = 'Bearer realm="Authentication required"'
    if code in (None, "RepoNotFound"):
        return JSONResponse({"error": message}, status, headers)
    return Response(message, status, headers, "text/plain; charset=utf-8")


def _unknown_revision(repository: HostedRepository, revision: str) -> Response | None:
    if revision in ("main", repository.sha):
        return None
    return _refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")


def _content(
    request: Request,
    content: bytes,
    etag: str,
    headers: dict[str, str] | None = None,
    kind: str = "application/octet-stream",
) -> Response:
    headers = {"ETag": etag, "Accept-Ranges": "bytes", **(headers or {})}
    span = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("range", ""))
    if span and request.headers.get("if-range", etag) == etag:
        first, last = int(span[1]), min(int(span[2] or len(content) - 1), len(content) - 1)
        if first > last:
            return Response(b"", 416, {"Content-Range": f"bytes */{len(content)}"})
        headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
        return Response(content[first : last + 1], 206, headers, kind)
    return Response(content, 200, headers, kind)


@contextlib.contextmanager
def public_hub() -> Iterator[PublicHub]:
    """Serve both hosts for as long as the block lasts."""
    hub = PublicHub()
    with serving(hub.hub) as hub.endpoint, serving(hub.storage) as address:
        # Another name as well as another port, as the public ones have.
        hub.storage_endpoint = address.replace("127.0.0.1", "localhost")
        yield hub


def written(hub: PublicHub, name: str, folder: Path) -> bool:
    """Whether the files in a folder are those of a repository."""
    files = hub.find(name).files
    return all((folder / path.name).read_bytes() == files[path.name].content for path in folder.iterdir())
