"""What parses bytes of the Hub, of what stands between, of models' processes and of an index."""

from __future__ import annotations

import contextlib
import functools
import json
import shutil
import socket
import struct
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import safetensors
from PIL import Image

from probelog.encoders.decoding import UnreadableImageError, decode
from probelog.encoders.image import ImageSettings
from probelog.encoders.text import TextSettings
from probelog.errors import FailureReason, ItemFailure, SchemaVersionError, StoreError, UsageError
from probelog.hub.client import BrokenAnswerError, HubClient, HubError, HubResponse, Retry, parse_json
from probelog.hub.download import download_model, read_shards
from probelog.hub.listing import ListingFilters
from probelog.hub.model_info import read_files, read_row
from probelog.index.local_files import check_files
from probelog.index.pointer import Pointer
from probelog.index.settings import GenerationSettings
from probelog.models.config import LoadLimits
from probelog.models.loading import load_classifier
from probelog.models.preprocessing import Recipe, transformers_recipe
from probelog.probes.sources import candidates, source_files
from probelog.sandbox import answers
from probelog.sandbox.protocol import Channel, ClosedError
from probelog.storage.checksummed_json import sealed_json
from probelog.storage.encoding import from_npy
from probelog.storage.layout import is_generation_name
from probelog.storage.schemas import (
    CATALOGUE,
    FAILURES,
    PROBED_MODELS,
    CatalogueRow,
    Failure,
    ProbedModel,
    RepoFile,
    to_table,
)
from probelog.weights.reader import Weights
from probelog.weights.safetensors import read_header
from tests.fuzz.harness import target
from tests.support.hub import hostile

_QUICK = Retry(
    attempts=1, first_wait=0.01, longest_wait=0.01, throttled=1, longest_penalty=0.01, connect_timeout=1.0,
    read_timeout=0.3, api_timeout=0.5,
)  # fmt: skip
_SHA = "0123456789abcdef0123456789abcdef01234567"


@target(ItemFailure)
def safetensors_file(data: bytes, folder: Path) -> None:
    """A whole file. What is accepted the library must read as the same tensors."""
    path = folder / "model.safetensors"
    path.write_bytes(data)
    header = read_header(path)
    theirs = {name: (entry["dtype"], tuple(entry["shape"])) for name, entry in safetensors.deserialize(data)}
    assert {name: (tensor.dtype, tensor.shape) for name, tensor in header.tensors.items()} == theirs
    Weights(folder).read()


@target(ItemFailure)
def safetensors_header(data: bytes, folder: Path) -> None:
    """The JSON of a header; its length and the file's are right."""
    ends = [0]
    try:
        entries = json.loads(data).values()
        ends += [entry["data_offsets"][1] for entry in entries if "data_offsets" in entry]
    except (ValueError, TypeError, AttributeError, LookupError, RecursionError):
        pass
    size = max((end for end in ends if type(end) is int and 0 <= end < 1 << 16), default=0)
    safetensors_file(struct.pack("<Q", len(data)) + data + bytes(size), folder)


@target(ItemFailure)
def shards(data: bytes, folder: Path) -> None:
    """The index of weights in several files, as the download and as the loader read it."""
    (folder / "model.safetensors.index.json").write_bytes(data)
    hostile.write_safetensors(folder / "a.safetensors", {"w": hostile.entry([1], 0, 4)}, bytes(4))
    names = read_shards(data)
    assert all("/" not in name for name in names)
    Weights(folder).read()


@functools.cache
def _repository(kind: str) -> tempfile.TemporaryDirectory[str]:
    folder = tempfile.TemporaryDirectory(prefix="probelog-fuzz-")
    (hostile.vit if kind == "transformers" else hostile.timm_repository)(Path(folder.name))
    return folder


def _check(failure: ItemFailure, *never: FailureReason) -> None:
    assert failure.reason not in (FailureReason.INTERNAL, *never)
    assert len(failure.detail) < 2000


def _loaded(folder: Path) -> None:
    try:
        load_classifier(folder)
    except ItemFailure as failure:
        _check(failure)
        raise


@target(ItemFailure)
def transformers_configuration(data: bytes, folder: Path) -> None:
    """``config.json`` of a model of transformers, whole: until it is loaded."""
    shutil.copytree(_repository("transformers").name, folder, dirs_exist_ok=True)
    (folder / "config.json").write_bytes(data)
    _loaded(folder)


@target(ItemFailure)
def timm_configuration(data: bytes, folder: Path) -> None:
    """``config.json`` of a model of timm, whole: until it is loaded."""
    shutil.copytree(_repository("timm").name, folder, dirs_exist_ok=True)
    (folder / "config.json").write_bytes(data)
    _loaded(folder)


@target(ItemFailure)
def processor(data: bytes, folder: Path) -> None:
    """``preprocessor_config.json``, until an image has gone through it."""
    (folder / "preprocessor_config.json").write_bytes(data)
    recipe = transformers_recipe(folder, "vit", 16, 512)
    recipe.geometry([Image.new("RGB", (30, 20))])
    assert Recipe.from_json(recipe.to_json(), 512) == recipe


@target(BrokenAnswerError)
def listing_page(data: bytes, _: Path) -> None:
    """A page of models, or one model's own page, until it is in a table."""
    value = parse_json(data)
    rows, failures = [], []
    for item in value if isinstance(value, list) else [value]:
        try:
            rows.append(read_row(item))
        except ItemFailure as failure:
            _check(failure)
            failures.append(Failure.of("x", "", "crawl", failure.reason, failure.detail))
    to_table(rows, CATALOGUE)
    to_table(failures, FAILURES)
    for row in rows:
        ListingFilters(licences=("mit",), max_bytes=1, max_params=1).accepts(row)
        read_files([{"path": file.path, "size": file.size} for file in row.files])


class _Server:
    """Sends any bytes for an answer, once for each connection, and hangs up."""

    def __init__(self) -> None:
        self.answer = b""
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"http://127.0.0.1:{self._listening.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            connection, _ = self._listening.accept()
            try:
                with connection:
                    connection.settimeout(2)
                    connection.recv(65536)
                    connection.sendall(self.answer)
                    connection.shutdown(socket.SHUT_WR)
                    connection.recv(65536)
            except OSError:
                pass  # the client had enough


class _NoLimit:
    def acquire(self, kind: object) -> None:
        """At once."""

    def penalise(self, kind: object, seconds: float) -> None:
        """Nobody waits here."""


@functools.cache
def _client() -> tuple[HubClient, _Server]:
    server = _Server()
    return HubClient(server.endpoint, limiter=_NoLimit(), retry=_QUICK), server


_HEADERS = (
    b"Content-Encoding: gzip\r\n", b"Content-Encoding: gzip, gzip\r\n", b"Transfer-Encoding: chunked\r\n", b"Content-Length: -1\r\n",
    b"Content-Length: " + b"9" * 5000 + b"\r\n", b"Location: http://[::ffff:169.254.169.254]/\r\n", b"Location: //user:pw@127.0.0.1:1/\r\n",
    b"Location: http://\xff:99999/\r\n", b"Location: http://xn--0/\r\n", b"Location: http://a..b/\r\n", b"Location: http://a:b:c/\r\n", b"Link: <http://[>; rel=\"next\"\r\n", b"Link: <\x7f>; rel=next\r\n",
    b"Retry-After: 99999999999\r\n", b"Retry-After: -1\r\n", b"ETag: \"\xe9\"\r\n", b"Date: Mon, 99 Foo 99999 99:99:99 +9999\r\n",
    b"Content-Range: bytes 0-9/" + b"9" * 400 + b"\r\n", b"Set-Cookie: a=b; Domain=.; Path=\x01\r\n", b"HTTP/1.1 103 Early Hints\r\n\r\n",
    b"HTTP/1.1 302 Found\r\n", b"X-Linked-Size: 99999999999999999999\r\n",
)  # fmt: skip


@target(HubError, tokens=_HEADERS)
def answer(data: bytes, _: Path) -> None:
    """A whole HTTP answer to a request of the API and to one for a file."""
    client, server = _client()
    server.answer = data
    kept: list[HubResponse] = []
    with contextlib.suppress(HubError):
        client.call("file", f"{server.endpoint}/x", kept.append)
    client.json("/api/models")


@target(ItemFailure, tokens=_HEADERS)
def download(data: bytes, folder: Path) -> None:
    """A whole HTTP answer to the request for a model's files."""
    client, server = _client()
    server.answer = data
    files = [RepoFile("config.json", None, None), RepoFile("model.safetensors", None, None)]
    row: Any = CatalogueRow(repo="ada/vit", sha=_SHA, files=files)
    try:
        download_model(client, row, folder / "model")
    except ItemFailure as failure:
        _check(failure, FailureReason.STORE_FAILED)
        raise


@target(UnreadableImageError)
def image(data: bytes, _: Path) -> None:
    """A picture of a set of probes, or of a query."""
    decode(data)


@target(UsageError)
def probes(data: bytes, folder: Path) -> None:
    """A Parquet file of probes."""
    path = folder / "x.parquet"
    path.write_bytes(data)
    for _, found in candidates(source_files(str(path))[0]):
        assert found


@target(ValueError, ClosedError, TimeoutError)
def process_message(data: bytes, _: Path) -> None:
    """What a model's process writes to its worker."""
    here, there = socket.socketpair()
    with there:
        there.setblocking(False)
        with contextlib.suppress(OSError):
            there.sendall(data)
        there.shutdown(socket.SHUT_WR)
        message, strings = Channel(here.detach()).receive([64, 1 << 16], time.monotonic() + 1)
    assert isinstance(message, dict)
    assert all(len(one) <= bound for one, bound in zip(strings, (64, 1 << 16), strict=False))


@target(ValueError, ItemFailure)
def process_answer(data: bytes, _: Path) -> None:
    """What a model's process says about its model, once it is JSON."""
    said = json.loads(data)
    if not isinstance(said, dict):
        return
    failure = answers.failure(said)
    if failure is not None:
        assert len(failure.detail) <= answers.LONGEST_DETAIL
        return
    answers.run(said, 64)
    believed = answers.facts(said.get("facts"), LoadLimits(max_parameters=10**9))
    answers.weights("a/b", _SHA, said.get("weights"), bytes(answers.SKETCH_BYTES))
    model = ProbedModel(repo="a/b", sha=_SHA, probes=[0], **believed)
    to_table([model], PROBED_MODELS)


@target(StoreError, SchemaVersionError)
def pointer(data: bytes, _: Path) -> None:
    """The pointer of an index: as it is, and with the seal of what it says."""
    with contextlib.suppress(ValueError, RecursionError):
        value = json.loads(data)
        if isinstance(value, dict) and value:
            data = sealed_json({name: item for name, item in value.items() if name != "seal"})
    read = Pointer.from_bytes(data, "here")
    assert all(map(is_generation_name, [*read.referenced, *read.retired]))
    assert Pointer.from_bytes(read.to_bytes(), "here") == read


@target(StoreError, SchemaVersionError)
def index_settings(data: bytes, _: Path) -> None:
    """The settings of a generation, with those of its encoders."""
    try:
        content = json.loads(data)
    except (ValueError, RecursionError):
        return
    read = GenerationSettings.from_dict(content, "here")
    assert (
        GenerationSettings.from_dict(json.loads(read.to_bytes()), "here").to_dict().keys()
        == read.to_dict().keys()
    )
    TextSettings.from_dict(read.text_encoder)
    ImageSettings.from_dict(read.image_encoder or {})


@target(ValueError)
def array(data: bytes, _: Path) -> None:
    """An array of an index."""
    assert from_npy(data).nbytes <= len(data)


@target(StoreError)
def manifest(data: bytes, folder: Path) -> None:
    """What Lance says of a table; only whether its data lie elsewhere is read."""
    (folder / "_versions").mkdir()
    (folder / "_versions" / "1.manifest").write_bytes(data)
    check_files(folder, folder)
