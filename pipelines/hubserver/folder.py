"""What a folder of repositories says about itself: files, digests, and the metadata that the Hub would list."""

from __future__ import annotations

import datetime as dt
import hashlib
import json
import logging
import os
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from probelog.errors import ConfigError, UsageError
from probelog.hub.huggingface import is_repo_id
from probelog.storage.schemas import clean_unicode

Fact = TypeVar("Fact")
log = logging.getLogger(__name__)

LISTING = "hub.json"
LFS_SUFFIXES = (
    ".bin", ".ckpt", ".gguf", ".h5", ".joblib", ".msgpack", ".npz", ".onnx", ".pb", ".pickle", ".pkl", ".pt",
    ".pth", ".safetensors", ".tflite", ".zip",
)  # fmt: skip
LFS_SIZE = 10 * 1024 * 1024
SHA = re.compile(r"[0-9a-f]{40}")
_LONGEST_CONFIG = 20 * 1024 * 1024
_LONGEST_HEADER = 25 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class HubFile:
    """One file of a repository: its path there, where it lies (symbolic links resolved), bytes, mtime in ns."""

    path: str
    local: Path
    size: int
    mtime: int

    @property
    def is_lfs(self) -> bool:
        """Whether the Hub would store it by SHA-256 (large or binary) rather than in git."""
        return self.size > LFS_SIZE or self.path.lower().endswith(LFS_SUFFIXES)


@dataclass(frozen=True, slots=True)
class Digests:
    """The names that the Hub gives to a file's content: SHA-256 and git's blob id."""

    sha256: str
    blob: str


@dataclass(frozen=True, slots=True)
class Repository:
    """One repository: its files by path, and what ``hub.json`` says about it."""

    id: str
    files: dict[str, HubFile]
    listed: Mapping[str, Any] = field(default_factory=dict)

    @property
    def gated(self) -> bool | str:
        """False, or who lets people in (``auto``, ``manual``)."""
        gated: bool | str = self.listed.get("gated") or False
        return "auto" if gated is True else gated

    @property
    def disabled(self) -> bool:
        """Whether the Hub serves none of its files."""
        return bool(self.listed.get("disabled"))

    @property
    def private(self) -> bool:
        """Whether the Hub shows it to its owner only."""
        return bool(self.listed.get("private"))

    @property
    def is_open(self) -> bool:
        """Whether everybody may read its files."""
        return not (self.gated or self.disabled or self.private)

    @property
    def created_at(self) -> str:
        """As listed, else the time of the newest change."""
        text = self.listed.get("createdAt")
        return _hub_time(_parse_time(text)) if text else self.last_modified

    @property
    def last_modified(self) -> str:
        """As the Hub writes it; such texts sort by time."""
        text = self.listed.get("lastModified")
        newest = max((file.mtime for file in self.files.values()), default=0)
        return _hub_time(_parse_time(text) if text else dt.datetime.fromtimestamp(newest / 1e9, dt.UTC))


class HubFolder:
    """A folder of repositories. May change while it is served: every look reads the directory anew.

    Raises:
        UsageError: the folder is missing, holds no repository, or its ``hub.json`` is malformed.
    """

    def __init__(self, root: Path) -> None:
        if not root.is_dir():
            raise UsageError(f"{root} is not a folder. Give a folder with OWNER/NAME/config.json in it.")
        self.root = root.resolve()
        self._lock = threading.Lock()
        self._digests: dict[Path, tuple[int, int, Digests]] = {}
        self._facts: dict[Path, tuple[int, int, Any]] = {}
        self._listing: dict[str, Mapping[str, Any]] = {}
        self._listing_stamp: tuple[int, int] | None = None
        self._read_listing()
        if not self.repositories():
            raise UsageError(f"{root} holds no repository. Put models into it as OWNER/NAME/config.json.")

    def repositories(self) -> dict[str, Repository]:
        """Every repository by its id: those with a folder, and those that only ``hub.json`` names (no files)."""
        listing = self._current_listing()
        repositories = {
            name: self._repository(name, folder, listing) for name, folder in self._folders(listing)
        }
        for name in listing.keys() - repositories.keys():
            repositories[name] = Repository(name, {}, listing[name])
        return repositories

    def repository(self, name: str) -> Repository | None:
        """One repository by its id, or None."""
        if not is_repo_id(name):
            return None
        listing = self._current_listing()
        folder = self._inside(self.root / name)
        first, _, second = name.partition("/")
        if (
            folder is not None
            and folder.is_dir()
            # A repository without owner has folders, and these are no repositories.
            and self._is_repository(self.root / first, first, listing) != bool(second)
            and self._is_reachable(folder, name, listing)
        ):
            return self._repository(name, folder, listing)
        return Repository(name, {}, listing[name]) if name in listing else None

    def renamed(self, name: str) -> str | None:
        """What a repository that had this id is called now, or None."""
        listing = self._current_listing().values()
        return next((str(entry["id"]) for entry in listing if name in (entry.get("formerly") or ())), None)

    def digests(self, file: HubFile) -> Digests:
        """SHA-256 and blob id of a file; read once for as long as its size and mtime stay the same."""
        with self._lock:
            known = self._digests.get(file.local)
        if known is None or known[:2] != (file.size, file.mtime):
            known = (file.size, file.mtime, _digests(file))
            with self._lock:
                self._digests[file.local] = known
        return known[2]

    def sha(self, repository: Repository) -> str:
        """The commit: as listed, else a digest of every file's path and content, so that it changes with them."""
        listed = repository.listed.get("sha")
        if listed:
            return str(listed)
        content = [[path, self.digests(file).sha256] for path, file in sorted(repository.files.items())]
        return hashlib.sha256(json.dumps([repository.id, content]).encode()).hexdigest()[:40]

    def config(self, repository: Repository) -> dict[str, Any]:
        """The repository's config.json; empty where it is missing, too long or no JSON object."""
        file = repository.files.get("config.json")
        config = self._fact(file, _read_config) if file is not None else {}
        return config if isinstance(config, dict) else {}

    def safetensors(self, repository: Repository) -> dict[str, Any] | None:
        """Parameter counts by type, from the headers of the safetensors files, as the Hub lists them."""
        counts: dict[str, int] = {}
        for path, file in repository.files.items():
            if "/" not in path and path.endswith(".safetensors"):
                for kind, count in (self._fact(file, _read_counts) or {}).items():
                    counts[kind] = counts.get(kind, 0) + count
        return {"parameters": counts, "total": sum(counts.values())} if counts else None

    def _fact(self, file: HubFile, read: Callable[[HubFile], Fact]) -> Fact:
        with self._lock:
            known = self._facts.get(file.local)
        if known is None or known[:2] != (file.size, file.mtime):
            known = (file.size, file.mtime, read(file))
            with self._lock:
                self._facts[file.local] = known
        fact: Fact = known[2]
        return fact

    def _folders(self, listing: Mapping[str, Any]) -> Iterator[tuple[str, Path]]:
        for name, folder in self._subfolders(self.root):
            if self._is_repository(folder, name, listing):
                if self._is_reachable(folder, name, listing):
                    yield name, folder
                continue
            for second, inner in self._subfolders(folder):
                if not is_repo_id(f"{name}/{second}"):
                    log.warning("%s is not served: its name cannot be a repository id", inner)
                elif self._is_reachable(inner, f"{name}/{second}", listing):
                    yield f"{name}/{second}", inner

    def _is_repository(self, folder: Path, name: str, listing: Mapping[str, Any]) -> bool:
        return name in listing or ((folder / "config.json").is_file() and is_repo_id(name))

    def _subfolders(self, folder: Path) -> Iterator[tuple[str, Path]]:
        for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
            if not entry.name.startswith(".") and entry.is_dir():
                target = self._inside(Path(entry.path))
                if target is not None:
                    yield entry.name, target

    def _inside(self, path: Path) -> Path | None:
        """Where a path really lies, or None where that is outside the folder (a symbolic link leads away)."""
        try:
            target = path.resolve(strict=True)
        except (OSError, RuntimeError):
            return None
        return target if target.is_relative_to(self.root) else None

    def _is_reachable(self, folder: Path, name: str, listing: Mapping[str, Any]) -> bool:
        """Whether a repository's folder may be served by this id: not where a link leads past another one's gate."""
        if folder == self.root / name:
            return True
        owner = self._owner(folder, listing)
        reachable = owner in (None, name) or Repository(str(owner), {}, listing.get(str(owner), {})).is_open
        if not reachable:
            log.warning("%s is not served: it is a link to %s, which is not open to everybody", name, owner)
        return reachable

    def _may_link(self, root: Path, target: Path, listing: Mapping[str, Any]) -> bool:
        """Whether a file that a repository (whose folder is ``root``) links to may be served as its own.

        Uploaders can make links. One may lead to what is served anyway, here or in a repository that is open to everybody,
        and to the blobs of the repository's own cache (of `huggingface_hub`): not past a gate, and to no hidden file
        (``.git/config`` may hold a token).
        """
        if root.parent.name == "snapshots" and target.parent == root.parent.parent / "blobs":
            return True
        if target.is_relative_to(root):
            return not _is_hidden(target.relative_to(root))
        owner = self._owner(target, listing)
        return (
            owner is not None
            and not _is_hidden(target.relative_to(self.root))
            and Repository(owner, {}, listing.get(owner, {})).is_open
        )

    def _owner(self, path: Path, listing: Mapping[str, Any]) -> str | None:
        """The id of the repository that a resolved path belongs to; None for what belongs to none."""
        parts = path.relative_to(self.root).parts
        if parts and self._is_repository(self.root / parts[0], parts[0], listing):
            return parts[0]
        return "/".join(parts[:2]) if len(parts) > 1 else None

    def _repository(self, name: str, folder: Path, listing: Mapping[str, Any]) -> Repository:
        files = {
            file.path: file
            for file in self._files(folder, "")
            if file.local == folder / file.path or self._may_link(folder, file.local, listing)
        }
        return Repository(name, files, listing.get(name, {}))

    def _files(self, folder: Path, prefix: str) -> Iterator[HubFile]:
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except FileNotFoundError:  # removed since it was listed
            return
        for entry in entries:
            # Hidden names are a client's own (.cache, .git), and bytes that are no UTF-8 cannot be listed.
            if entry.name.startswith(".") or not entry.name.isprintable():
                continue
            path = f"{prefix}{entry.name}"
            # A folder reached through a link is left out: links can make circles.
            if entry.is_dir(follow_symlinks=False):
                yield from self._files(Path(entry.path), path + "/")
            elif entry.is_file() and (local := self._inside(Path(entry.path))) is not None:
                status = local.stat()
                yield HubFile(path, local, status.st_size, status.st_mtime_ns)

    def _current_listing(self) -> Mapping[str, Mapping[str, Any]]:
        try:
            self._read_listing()
        except UsageError as error:
            log.error("%s; serving what it said before", error)
        return self._listing

    def _read_listing(self) -> None:
        path = self.root / LISTING
        with self._lock:  # whoever asks while it is read must not be told what it said before
            try:
                status = path.stat()
            except FileNotFoundError:
                self._listing, self._listing_stamp = {}, None
                return
            stamp = (status.st_size, status.st_mtime_ns)
            if stamp != self._listing_stamp:
                self._listing_stamp = stamp
                self._listing = read_listing(path)


def read_listing(path: Path) -> dict[str, Mapping[str, Any]]:
    """``hub.json``: a list of objects, one for each repository, by id.

    Understood: ``id`` (required), ``library`` (or ``library_name``), ``pipeline_tag``, ``lastModified`` and
    ``createdAt`` (ISO 8601), ``downloads``, ``likes``, ``license``, ``sha`` (40 hexadecimal digits), ``gated``, ``disabled``,
    ``private`` (then it is shown to nobody: there are no accounts), ``tags``, ``base_model``, ``base_model_relation``, ``cardData``, and
    ``formerly`` (names that the repository had, which lead on to it). Other keys are listed as they are.

    Raises:
        ConfigError: not such a list; names every entry that is wrong.
    """
    try:
        entries = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(str(path), [f"cannot be read as JSON: {error}"]) from error
    if not isinstance(entries, list):
        raise ConfigError(str(path), ['must be a list of objects such as {"id": "owner/name"}'])
    listing: dict[str, Mapping[str, Any]] = {}
    problems = []
    for number, entry in enumerate(entries):
        name = entry.get("id") if isinstance(entry, dict) else None
        where = f"entry {number} ({name})" if isinstance(name, str) else f"entry {number}"
        problems += [f"{where}: {problem}" for problem in _entry_problems(entry)]
        if isinstance(name, str):
            if name in listing:
                problems.append(f"{where}: the id occurs twice")
            listing[name] = entry
    if problems:
        raise ConfigError(str(path), problems)
    return listing


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _entry_problems(entry: object) -> Iterator[str]:
    if not isinstance(entry, dict):
        yield "must be an object"
        return
    if not isinstance(entry.get("id"), str):
        yield "needs an id, a text such as owner/name"
    elif not is_repo_id(entry["id"]):
        yield "the id cannot be a repository's (owner/name of letters, digits, '-', '_' and '.')"
    for key, kinds, meant in _ENTRY_TYPES:
        value = entry.get(key)
        # True is an int to Python, not to the reader of a listing.
        if value is not None and (not isinstance(value, kinds) or (kinds is int and isinstance(value, bool))):
            yield f"{key} must be {meant}, not {value!r}"
    if isinstance(entry.get("sha"), str) and not SHA.fullmatch(entry["sha"]):
        yield f"sha must be 40 hexadecimal digits, not {entry['sha']!r}"
    for key in ("tags", "base_model", "formerly"):
        if isinstance(entry.get(key), list) and not all(isinstance(item, str) for item in entry[key]):
            yield f"{key} must hold texts only"
    for key in ("lastModified", "createdAt"):
        if isinstance(entry.get(key), str):
            try:
                _parse_time(entry[key])
            except ValueError:
                yield f"{key} must be a time such as 2025-01-31T08:00:00.000Z, not {entry[key]!r}"


_ENTRY_TYPES: tuple[tuple[str, type | tuple[type, ...], str], ...] = (
    ("library", str, "a text"),
    ("library_name", str, "a text"),
    ("pipeline_tag", str, "a text"),
    ("lastModified", str, "a text"),
    ("createdAt", str, "a text"),
    ("base_model_relation", str, "a text"),
    ("downloads", int, "a whole number"),
    ("likes", int, "a whole number"),
    ("license", str, "a text"),
    ("sha", str, "a text"),
    ("gated", (bool, str), "true, false, auto or manual"),
    ("disabled", bool, "true or false"),
    ("private", bool, "true or false"),
    ("tags", list, "a list of texts"),
    ("base_model", (str, list), "a text or a list of texts"),
    ("cardData", dict, "an object"),
    ("formerly", list, "a list of texts"),
)


def metadata(folder: HubFolder, repository: Repository, requested: Iterable[str]) -> dict[str, Any]:
    """The values that the Hub's model API gives under the wanted names; names it does not know are left out.

    Only what is wanted is computed: the commit costs a read of every file when it is not listed.
    """
    row: dict[str, Any] = {}
    for name in requested:
        if name in _DERIVED:
            row[name] = _DERIVED[name](folder, repository)
        elif name in repository.listed:
            row[name] = repository.listed[name]
    return row


def library(folder: HubFolder, repository: Repository) -> str | None:
    """The library as listed, else guessed from config.json."""
    listed = repository.listed
    if "library" in listed or "library_name" in listed:
        return listed.get("library") or listed.get("library_name")
    config = folder.config(repository)
    if _is_timm(config):
        return "timm"
    return "transformers" if "model_type" in config or "architectures" in config else None


def pipeline_tag(folder: HubFolder, repository: Repository) -> str | None:
    """The task as listed, else image-classification where config.json is that of an image classifier."""
    if "pipeline_tag" in repository.listed:
        tag: str | None = repository.listed["pipeline_tag"]
        return tag
    config = folder.config(repository)
    architecture = _first(config.get("architectures"))
    classifier = isinstance(architecture, str) and architecture.endswith("ForImageClassification")
    return "image-classification" if classifier or _is_timm(config) else None


def tags(folder: HubFolder, repository: Repository) -> list[str]:
    """The tags that the Hub computes from library, task, licence and base models, and those listed."""
    card = card_data(folder, repository)
    computed = [library(folder, repository), pipeline_tag(folder, repository)]
    if "safetensors" in {path.rsplit(".", 1)[-1] for path in repository.files}:
        computed.append("safetensors")
    computed += [f"license:{name}" for name in _texts(card.get("license"))]
    parents = _texts(card.get("base_model"))
    computed += [f"base_model:{name}" for name in parents]
    if isinstance(relation := card.get("base_model_relation"), str):
        computed += [f"base_model:{relation}:{name}" for name in parents]
    computed += _texts(card.get("tags")) + _texts(repository.listed.get("tags"))
    return list(dict.fromkeys(tag for tag in computed if tag))


def card_data(folder: HubFolder, repository: Repository) -> dict[str, Any]:
    """The model card's fields as far as ``hub.json`` says them."""
    listed = repository.listed
    facts = {
        "license": listed.get("license"),
        "library_name": library(folder, repository),
        "pipeline_tag": pipeline_tag(folder, repository),
        "base_model": listed.get("base_model"),
        "base_model_relation": listed.get("base_model_relation"),
    }
    return {key: value for key, value in facts.items() if value} | dict(listed.get("cardData") or {})


def _hub_config(folder: HubFolder, repository: Repository) -> dict[str, Any]:
    if "config" in repository.listed:
        listed: dict[str, Any] = repository.listed["config"]
        return listed
    config = folder.config(repository)
    # The Hub's own excerpt: never the labels, which may be thousands, and only what JSON in UTF-8 can say.
    excerpt: dict[str, Any] = {
        key: clean_unicode(config[key])
        for key in ("architecture", "model_type")
        if isinstance(config.get(key), str)
    }
    if isinstance(config.get("architectures"), list):
        excerpt["architectures"] = [clean_unicode(name) for name in _texts(config["architectures"])]
    return excerpt


_DERIVED: dict[str, Callable[[HubFolder, Repository], Any]] = {
    "id": lambda folder, repository: repository.id,
    "modelId": lambda folder, repository: repository.id,
    "author": lambda folder, repository: repository.id.split("/")[0] if "/" in repository.id else None,
    "sha": lambda folder, repository: folder.sha(repository),
    "lastModified": lambda folder, repository: repository.last_modified,
    "createdAt": lambda folder, repository: repository.created_at,
    "private": lambda folder, repository: repository.private,
    "gated": lambda folder, repository: repository.gated,
    "disabled": lambda folder, repository: repository.disabled,
    "downloads": lambda folder, repository: repository.listed.get("downloads") or 0,
    "likes": lambda folder, repository: repository.listed.get("likes") or 0,
    "library_name": library,
    "pipeline_tag": pipeline_tag,
    "tags": tags,
    "cardData": card_data,
    "config": _hub_config,
    "safetensors": lambda folder, repository: repository.listed.get("safetensors") or folder.safetensors(repository),
    "siblings": lambda folder, repository: [{"rfilename": path} for path in repository.files],
    "usedStorage": lambda folder, repository: sum(file.size for file in repository.files.values()),
}  # fmt: skip


def pointer(digests: Digests, size: int) -> bytes:
    """The text that git holds in place of a file in LFS (git-lfs specification, version 1)."""
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{digests.sha256}\nsize {size}\n".encode()


def git_blob(data: bytes) -> str:
    """Git's id of a blob: SHA-1 of its length and content."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def _digests(file: HubFile) -> Digests:
    sha256 = hashlib.sha256()
    blob = hashlib.sha1(b"blob %d\0" % file.size, usedforsecurity=False)
    with open(file.local, "rb") as stream:
        while chunk := stream.read(1 << 20):
            sha256.update(chunk)
            blob.update(chunk)
    return Digests(sha256.hexdigest(), blob.hexdigest())


def _read_config(file: HubFile) -> object:
    if file.size > _LONGEST_CONFIG:
        return {}
    try:
        return json.loads(file.local.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}


def _read_counts(file: HubFile) -> dict[str, int]:
    """Elements by type from a safetensors header: 8 bytes of length, then JSON with a shape per tensor."""
    try:
        with open(file.local, "rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length)) if length <= min(_LONGEST_HEADER, file.size) else {}
        counts: dict[str, int] = {}
        for name, tensor in header.items():
            if name != "__metadata__":
                size = 1
                for extent in tensor["shape"]:
                    size *= int(extent)
                    if not 0 <= size <= 8 * file.size:  # no type takes less than a bit
                        return {}
                counts[tensor["dtype"]] = counts.get(tensor["dtype"], 0) + size
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return {}  # not a safetensors file, whatever its name says
    return counts


def _is_timm(config: Mapping[str, Any]) -> bool:
    return isinstance(config.get("architecture"), str) and (
        "pretrained_cfg" in config or "num_classes" in config
    )


def _first(value: object) -> object:
    return value[0] if isinstance(value, list) and value else None


def _texts(value: object) -> list[str]:
    items = value if isinstance(value, list) else [value]
    return [item for item in items if isinstance(item, str)]


def _parse_time(text: str) -> dt.datetime:
    time = dt.datetime.fromisoformat(text)
    return time if time.tzinfo else time.replace(tzinfo=dt.UTC)


def _hub_time(time: dt.datetime) -> str:
    utc = time.astimezone(dt.UTC)
    return utc.strftime("%Y-%m-%dT%H:%M:%S.") + f"{utc.microsecond // 1000:03d}Z"
