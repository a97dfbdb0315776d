"""The Hub on loopback, asked by the real client library and by hand."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from pipelines.hubserver import create_app, running
from pipelines.hubserver.folder import HubFolder
from probelog.errors import UsageError
from tests.support.hub.repositories import TIMM, VIT, Write
from tests.support.paths import BENCH as SHARED_BENCH
from tests.support.paths import CHECKOUT

BENCH = SHARED_BENCH / "hub"
SHA = "0123456789abcdef0123456789abcdef01234567"
Listing = Callable[[object], Path]


@pytest.fixture
def root(tmp_path: Path, write_repository: Write, write_listing: Listing) -> Path:
    write_repository("ada/vit", files={"README.md": b"# A model", "sub/notes.txt": b"notes"})
    write_repository("bea/resnet", TIMM, values=50)
    write_repository("bea/locked")
    write_repository("gone/away")
    write_repository("gpt2", {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]})
    return write_listing(
        [
            {
                "id": "ada/vit",
                "sha": SHA,
                "license": "mit",
                "lastModified": "2025-03-01T08:00:00.000Z",
                "likes": 3,
            },
            {
                "id": "bea/resnet",
                "lastModified": "2025-01-01T00:00:00Z",
                "downloads": 7,
                "base_model": "ada/vit",
            },
            {"id": "bea/locked", "gated": "manual", "lastModified": "2024-01-01T00:00:00Z"},
            {"id": "gone/away", "disabled": True, "lastModified": "2023-01-01T00:00:00Z"},
        ]
    )


def test_library_lists_and_filters(root: Path) -> None:
    from huggingface_hub import HfApi

    with running(root) as endpoint:
        api = HfApi(endpoint=endpoint)

        def ids(**query: Any) -> list[str]:
            return [model.id for model in api.list_models(**query)]

        assert set(ids()) == {"ada/vit", "bea/resnet", "bea/locked", "gone/away", "gpt2"}
        assert ids(sort="last_modified", pipeline_tag="image-classification") == [
            "ada/vit", "bea/resnet", "bea/locked", "gone/away",
        ]  # fmt: skip
        assert ids(filter="timm") == ["bea/resnet"]
        assert ids(filter=["transformers", "license:mit"]) == ["ada/vit"]
        assert ids(filter=["timm", "license:mit"]) == []
        assert set(ids(author="bea")) == {"bea/resnet", "bea/locked"}
        assert ids(search="RES") == ["bea/resnet"]
        assert ids(gated=True) == ["bea/locked"]
        assert ids(sort="downloads", limit=1) == ["bea/resnet"]
        row = next(
            iter(
                api.list_models(author="ada", expand=["sha", "config", "safetensors", "siblings", "cardData"])
            )
        )
        assert row.sha == SHA
        assert row.config == VIT
        assert row.safetensors is not None
        assert row.safetensors.parameters == {"F32": 100}
        assert row.card_data.license == "mit"
        assert row.downloads is None  # not asked for
        assert [file.rfilename for file in row.siblings or []] == [
            "README.md", "config.json", "model.safetensors", "sub/notes.txt",
        ]  # fmt: skip


def test_library_reads_one_model(root: Path) -> None:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    weights = (root / "ada/vit/model.safetensors").read_bytes()
    with running(root) as endpoint:
        api = HfApi(endpoint=endpoint)
        info = api.model_info("ada/vit", files_metadata=True)
        assert info.sha == SHA
        sizes = {
            file.rfilename: (file.size, file.lfs.sha256 if file.lfs else None) for file in info.siblings or []
        }
        assert sizes["model.safetensors"] == (len(weights), hashlib.sha256(weights).hexdigest())
        assert sizes["README.md"] == (9, None)
        assert api.model_info("ada/vit", revision=SHA).sha == SHA
        assert api.model_info("ada/vit", expand=["likes"]).likes == 3
        assert api.model_info("gpt2").pipeline_tag is None
        with pytest.raises(RevisionNotFoundError):
            api.model_info("ada/vit", revision="f" * 40)
        with pytest.raises(RepositoryNotFoundError):
            api.model_info("ada/nothing")
        tree = {entry.path: entry for entry in api.list_repo_tree("ada/vit", recursive=True)}
        assert set(tree) == {"README.md", "config.json", "model.safetensors", "sub", "sub/notes.txt"}
        assert tree["model.safetensors"].lfs.sha256 == hashlib.sha256(weights).hexdigest()
        # Git's own id of the nine bytes (`git hash-object`).
        assert tree["README.md"].blob_id == hashlib.sha1(b"blob 9\0# A model").hexdigest()
        assert [entry.path for entry in api.list_repo_tree("ada/vit", "sub")] == ["sub/notes.txt"]
        api.auth_check("ada/vit")
        with pytest.raises(GatedRepoError):
            api.auth_check("bea/locked")
        assert api.model_info("bea/locked").gated == "manual"


def test_library_downloads_through_hf_endpoint(root: Path, tmp_path: Path) -> None:
    """In a process of its own: the library reads ``HF_ENDPOINT`` when it is imported."""
    script = """
import json, sys
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, DisabledRepoError
found = {"snapshot": snapshot_download("ada/vit", local_dir=sys.argv[1] + "/local")}
found["single"] = hf_hub_download("gpt2", "config.json", cache_dir=sys.argv[1] + "/cache")
for name, call in {
    "entry": lambda: hf_hub_download("ada/vit", "nothing.json", cache_dir=sys.argv[1]),
    "gated": lambda: hf_hub_download("bea/locked", "config.json", cache_dir=sys.argv[1]),
    "disabled": lambda: HfApi().get_hf_file_metadata(url=__import__("huggingface_hub").hf_hub_url("gone/away", "config.json")),
}.items():
    try:
        call()
    except (EntryNotFoundError, GatedRepoError, DisabledRepoError) as error:
        found[name] = type(error).__name__
print(json.dumps(found))
"""
    with running(root) as endpoint:
        environment = {
            **os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1", "NO_PROXY": "127.0.0.1",
        }  # fmt: skip
        done = subprocess.run(
            [sys.executable, "-c", script, str(tmp_path)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
        )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    for name in ("config.json", "model.safetensors", "README.md", "sub/notes.txt"):
        assert Path(found["snapshot"], name).read_bytes() == (root / "ada/vit" / name).read_bytes()
    assert Path(found["single"]).read_bytes() == (root / "gpt2/config.json").read_bytes()
    assert (found["entry"], found["gated"], found["disabled"]) == (
        "RemoteEntryNotFoundError", "GatedRepoError", "DisabledRepoError",
    )  # fmt: skip


def test_a_renamed_repository_answers_under_its_old_name(root: Path, write_listing: Listing) -> None:
    from huggingface_hub import HfApi

    write_listing([{"id": "ada/vit", "sha": SHA, "formerly": ["eva/deit", "deit"]}, {"id": "bea/resnet"}])
    with running(root) as endpoint:
        for old in ("eva/deit", "deit"):
            assert HfApi(endpoint=endpoint).model_info(old).id == "ada/vit"
            for path, query in (
                (f"/api/models/{{}}/revision/{SHA}", "?blobs=true"),
                ("/api/models/{}/tree/refs%2Fheads%2Fmain", "?recursive=true"),
                ("/{}/resolve/main/config.json", ""),
            ):
                answer = httpx.get(endpoint + path.format(old) + query)
                assert answer.status_code == 307
                assert answer.headers["location"] == path.format("ada/vit") + query
                assert (
                    httpx.get(endpoint + path.format(old) + query, follow_redirects=True).status_code == 200
                )
        # A repository that takes the name answers for itself.
        write_listing([{"id": "ada/vit", "formerly": ["bea/resnet"]}])
        assert HfApi(endpoint=endpoint).model_info("bea/resnet").id == "bea/resnet"


def test_a_private_repository_is_never_listed(root: Path, write_listing: Listing) -> None:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    write_listing([{"id": "ada/vit", "private": True}])
    with running(root) as endpoint:
        api = HfApi(endpoint=endpoint)
        assert "ada/vit" not in {model.id for model in api.list_models()}
        with pytest.raises(RepositoryNotFoundError):
            api.model_info("ada/vit")
        for path in ("/api/models/ada/vit/tree/main", "/ada/vit/resolve/main/config.json"):
            assert httpx.get(endpoint + path).status_code == 401


def test_pages_are_stable_while_models_change(root: Path, write_repository: Write) -> None:
    with running(root) as endpoint:
        url = f"{endpoint}/api/models?sort=lastModified&limit=2&expand=lastModified"
        first = httpx.get(url)
        assert [row["id"] for row in first.json()] == ["gpt2", "ada/vit"]
        following = first.links["next"]["url"]
        assert following.startswith(f"{endpoint}/api/models?")
        write_repository("new/comer")  # newest: in front of what was already given out
        second = httpx.get(following)
        assert [row["id"] for row in second.json()] == ["bea/resnet", "bea/locked"]
        third = httpx.get(second.links["next"]["url"])
        assert [row["id"] for row in third.json()] == ["gone/away"]
        assert "next" not in third.links
        assert "new/comer" in {row["id"] for row in httpx.get(f"{endpoint}/api/models").json()}
        assert httpx.get(f"{url}&cursor=nonsense").status_code == 400
        assert httpx.get(f"{endpoint}/api/models?limit=none").status_code == 400
        assert httpx.get(f"{endpoint}/api/models?expand=nothing").status_code == 400
        ascending = httpx.get(f"{endpoint}/api/models?sort=lastModified&direction=1&limit=1").json()
        assert [row["id"] for row in ascending] == ["gone/away"]


def test_files_come_whole_or_in_ranges(root: Path) -> None:
    weights = (root / "ada/vit/model.safetensors").read_bytes()
    with running(root) as endpoint:
        url = f"{endpoint}/ada/vit/resolve/{SHA}/model.safetensors"
        head = httpx.head(url)
        assert head.headers["x-repo-commit"] == SHA
        assert head.headers["etag"] == f'"{hashlib.sha256(weights).hexdigest()}"'
        assert head.headers["content-length"] == str(len(weights))
        assert head.headers["accept-ranges"] == "bytes"
        assert httpx.get(url).content == weights
        part = httpx.get(url, headers={"range": "bytes=10-19"})
        assert (part.status_code, part.content) == (206, weights[10:20])
        assert part.headers["content-range"] == f"bytes 10-19/{len(weights)}"
        assert (
            httpx.get(url, headers={"range": "bytes=10-", "if-range": head.headers["etag"]}).status_code
            == 206
        )
        assert httpx.get(url, headers={"range": "bytes=10-", "if-range": '"other"'}).content == weights
        assert httpx.get(url, headers={"range": f"bytes={len(weights)}-"}).status_code == 416
        locked = httpx.get(f"{endpoint}/bea/locked/resolve/main/config.json")
        assert (locked.status_code, locked.headers["x-error-code"]) == (403, "GatedRepo")


def test_nothing_outside_the_folder_is_served(root: Path, tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_text("secret")
    (tmp_path / "secrets").mkdir()
    (tmp_path / "secrets/config.json").write_text('{"secret": 1}')
    (root / "ada/vit/link.txt").symlink_to(tmp_path / "secret.txt")
    (root / "ada/vit/folder").symlink_to(tmp_path / "secrets")
    (root / "ada/stolen").symlink_to(tmp_path / "secrets")
    (root / "ada/vit/inside.txt").symlink_to(root / "ada/vit/README.md")
    (root / "ada/vit/.hidden").write_text("hidden")
    with running(root) as endpoint:
        base = f"{endpoint}/ada/vit/resolve/main"
        for path in (
            "../../../secret.txt", "..%2f..%2f..%2fsecret.txt", "%2e%2e/%2e%2e/%2e%2e/secret.txt", "link.txt",
            "folder/config.json", ".hidden", "%2fetc%2fpasswd", "/etc/passwd", "sub/../../../../secret.txt", "a%00b",
        ):  # fmt: skip
            # By hand: a client would tidy the dots away before it asks.
            reply = _raw_get(endpoint, f"{base}/{path}".removeprefix(endpoint))
            assert reply.startswith((b"HTTP/1.1 404", b"HTTP/1.1 400")), (path, reply[:80])
            assert b"secret" not in reply
        for name in ("ada/stolen", "../secrets", "%2e%2e/secrets", "ada/..%2fvit"):
            reply = _raw_get(endpoint, f"/api/models/{name}")
            assert reply.startswith(b"HTTP/1.1 404"), (name, reply[:80])
        assert httpx.get(f"{base}/inside.txt").text == "# A model"
        listed = {
            file["rfilename"] for file in httpx.get(f"{endpoint}/api/models/ada/vit").json()["siblings"]
        }
        assert listed == {"README.md", "config.json", "model.safetensors", "sub/notes.txt", "inside.txt"}


def _raw_get(endpoint: str, target: str) -> bytes:
    import socket

    host, _, port = endpoint.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=5) as connection:
        connection.sendall(f"GET {target} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
        reply = b""
        while part := connection.recv(65536):
            reply += part
    return reply


def test_metadata_are_derived_where_none_are_listed(tmp_path: Path, write_repository: Write) -> None:
    folder = write_repository("bea/resnet", TIMM)
    root = tmp_path / "hub"
    with running(root) as endpoint:
        first = httpx.get(f"{endpoint}/api/models/bea/resnet").json()
        assert (first["library_name"], first["pipeline_tag"]) == ("timm", "image-classification")
        assert len(first["sha"]) == 40
        assert httpx.get(f"{endpoint}/api/models/bea/resnet").json()["sha"] == first["sha"]
        assert httpx.get(f"{endpoint}/bea/resnet/resolve/{first['sha']}/config.json").status_code == 200
        (folder / "config.json").write_text(json.dumps({**TIMM, "num_classes": 4}))
        assert httpx.get(f"{endpoint}/api/models/bea/resnet").json()["sha"] != first["sha"]
        stale = httpx.get(f"{endpoint}/bea/resnet/resolve/{first['sha']}/config.json")
        assert (stale.status_code, stale.headers["x-error-code"]) == (404, "RevisionNotFound")


def test_requests_during_a_new_listing_get_the_new_one(tmp_path: Path) -> None:
    file = tmp_path / "hub.json"
    file.write_text(json.dumps([{"id": f"a/{number}"} for number in range(20_000)]))
    hub = HubFolder(tmp_path)
    asking = threading.Barrier(8)

    def ask(_: int) -> bool:
        asking.wait()
        return hub.repository("a/0") is None

    with ThreadPoolExecutor(8) as pool:
        for kept in range(1, 4):
            file.write_text(json.dumps([{"id": f"a/{number}"} for number in range(kept - 1, 20_000)]))
            assert list(pool.map(ask, range(8))) == [kept > 1] * 8


@pytest.mark.parametrize(
    ("entries", "named"),
    [
        ("{", "cannot be read as JSON"),
        ({"id": "a/b"}, "must be a list"),
        ([{"id": "a/b"}, 7], "entry 1: must be an object"),
        ([{"name": "a/b"}], "entry 0: needs an id"),
        ([{"id": "../b"}], "entry 0 (../b): the id cannot"),
        ([{"id": "a/b"}, {"id": "a/b"}], "entry 1 (a/b): the id occurs twice"),
        ([{"id": "a/b", "sha": "main"}], "entry 0 (a/b): sha must be 40 hexadecimal digits"),
        ([{"id": "a/b", "downloads": "many"}], "entry 0 (a/b): downloads must be a whole number"),
        ([{"id": "a/b", "lastModified": "yesterday"}], "entry 0 (a/b): lastModified must be a time"),
        ([{"id": "a/b", "tags": ["x", 1]}], "entry 0 (a/b): tags must hold texts only"),
        ([{"id": "a/b", "formerly": [1]}], "entry 0 (a/b): formerly must hold texts only"),
    ],
)
def test_a_malformed_listing_is_refused_by_entry(write_listing: Listing, entries: object, named: str) -> None:
    with pytest.raises(UsageError) as caught:
        create_app(write_listing(entries))
    assert named in str(caught.value)


def test_a_listing_that_breaks_while_served_keeps_its_last_good_state(root: Path) -> None:
    with running(root) as endpoint:
        (root / "hub.json").write_text("[{")
        assert httpx.get(f"{endpoint}/api/models/ada/vit").json()["sha"] == SHA


def test_missing_and_empty_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is not a folder"):
        create_app(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="holds no repository"):
        create_app(tmp_path / "empty")


def test_a_taken_port_is_refused(root: Path) -> None:
    with (
        running(root) as endpoint,
        pytest.raises(UsageError, match="cannot listen"),
        running(root, port=int(endpoint.rpartition(":")[2])),
    ):
        pass


@pytest.mark.parametrize(
    ("level", "logged"),
    [
        ("error", ""),
        ("warning", "is not served: its name cannot be a repository id"),
        ("info", "GET /api/models/ada/vit"),
    ],
)
def test_the_command_serves_until_interrupted_and_logs_from_a_level_on(
    root: Path, level: str, logged: str
) -> None:
    (root / "ada/no--name").mkdir()
    with subprocess.Popen(
        [sys.executable, "-m", "pipelines", "hub", root, "--port", "0", "--log-level", level],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=CHECKOUT,
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        key, _, endpoint = process.stdout.readline().strip().removeprefix("export ").partition("=")
        assert key == "HF_ENDPOINT"
        assert httpx.get(f"{endpoint}/api/models/ada/vit").json()["sha"] == SHA
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 0
    assert logged in errors
    assert len(errors.splitlines()) == {"error": 0, "warning": 1}.get(level, len(errors.splitlines()))


@pytest.mark.skipif(not BENCH.is_dir(), reason="the bench folder is not beside the checkout")
def test_the_bench_folder_is_served() -> None:
    with running(BENCH) as endpoint:
        rows = httpx.get(f"{endpoint}/api/models?pipeline_tag=image-classification&expand=safetensors").json()
    assert len(rows) == 77
    assert all(row["safetensors"]["total"] > 0 for row in rows)
