"""Attacks from around the job: credentials that leave it, folders that others prepared, callers of the hub server."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import json
import os
import pickle
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import boto3
import httpx
import pytest

from cluster.probing.prober import ProberSpec
from cluster.runtime.scratch import own_downloads, scratch_folder
from cluster.runtime.session import _private_folder
from pipelines import hubserver
from pipelines.hubserver import create_app, running, serving
from probelog.errors import ConfigError, FailureReason, ItemFailure, StoreError, UsageError
from probelog.hub.client import HubClient, HubRefusalError
from probelog.storage.checksummed_json import sealed_json, unsealed_json
from probelog.storage.schemas import Failure
from probelog.storage.store import Store, lance_options
from tests.support.hub.faults import FaultyHub, answer
from tests.support.paths import CHECKOUT
from tests.support.processes.s3 import at, s3_environment
from tests.support.worlds.tiny_world import MODELS, TinyWorld

# Each in a place of its own, so that the one that is met says where from.
SECRETS = {
    "userinfo of HF_ENDPOINT": "hubPassw0rd",
    "HF_TOKEN": "hf_TokenOfTheOperator1234567890",
    "AWS_SECRET_ACCESS_KEY": "storeSecretKey0123456789",
    "AWS_ACCESS_KEY_ID": "AKIAABCDEFGHIJKLMNOP",
    "AWS_SESSION_TOKEN": "storeSessionToken0123456789",
    "userinfo of HTTPS_PROXY": "proxyPassw0rd",
    "signed address of a storage host": "signatureOfTheStorage0123",
    "RAY_AUTH_TOKEN": "rayTokenOfTheCluster0123456789abcdef",
}


class PasswordedHub(FaultyHub):
    """A mirror that lets nobody in without the password, as many a company's does."""

    async def __call__(self, scope, receive, send) -> None:  # type: ignore[no-untyped-def]
        headers = dict(scope["headers"])
        login = base64.b64encode(f"operator:{SECRETS['userinfo of HF_ENDPOINT']}".encode())
        if headers.get(b"authorization") != b"Basic " + login:
            await send(
                {"type": "http.response.start", "status": 401, "headers": [(b"x-error-message", b"log in")]}
            )
            await send({"type": "http.response.body", "body": b"{}"})
            return
        await super().__call__(scope, receive, send)


def with_login(address: str, user: str, password: str) -> str:
    scheme, _, rest = address.partition("://")
    return f"{scheme}://{user}:{password}@{rest}"


def spread(folder: Path) -> Iterator[tuple[str, bytes]]:
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            with contextlib.suppress(OSError):
                yield str(path), path.read_bytes()


def leaks(written: Iterator[tuple[str, bytes]]) -> list[str]:
    """Where which secret was met, also in the form in which HTTP sends a password."""
    login = base64.b64encode(f"operator:{SECRETS['userinfo of HF_ENDPOINT']}".encode()).decode()
    searched = {**SECRETS, "HTTP's form of the Hub's password": login}
    return [
        f"{what} in {where}"
        for where, data in written
        for what, secret in searched.items()
        if secret.encode() in data
    ]


@pytest.mark.acceptance
@pytest.mark.timeout(900)
def test_no_credential_of_a_job_is_written_anywhere(tiny_world: TinyWorld, tmp_path: Path) -> None:
    """A job with a secret in each place that takes one; some of its requests fail. Every byte that it wrote is searched."""
    root = tiny_world.copy_hub(tmp_path / "hub")
    shutil.copytree(tiny_world.encoder, root / "made/encoder")
    hub = PasswordedHub(create_app(root))
    with contextlib.ExitStack() as stack:
        ray = Path(
            stack.enter_context(TemporaryDirectory(prefix="r-", dir="/tmp", ignore_cleanup_errors=True))
        )
        bucket = stack.enter_context(s3_environment("kept"))
        endpoint = stack.enter_context(serving(hub))
        signed = f"http://127.0.0.1:9/blob?X-Amz-Signature={SECRETS['signed address of a storage host']}&X-Amz-Expires=60"
        hub.spoil("cleo/timm-half/resolve", answer(302, {"location": signed}))
        hub.spoil("bob/one-logit/resolve", answer(302, {"location": signed.replace(":9/", ":nine/")}))
        scratch = tmp_path / "scratch"
        config = tiny_world.config_file(
            tmp_path / "job.toml", "s3://kept/store", encoder="made/encoder", scratch=str(scratch), workers=1
        )
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("HF_", "RAY_"))},
            **bucket,
            "HF_ENDPOINT": with_login(endpoint, "operator", SECRETS["userinfo of HF_ENDPOINT"]),
            "HTTPS_PROXY": f"http://operator:{SECRETS['userinfo of HTTPS_PROXY']}@127.0.0.1:9",
            "NO_PROXY": "127.0.0.1",
            **{name: SECRETS[name] for name in SECRETS if " " not in name},
            "RAY_AUTH_MODE": "token",
            "RAY_TMPDIR": str(ray),
            "HOME": str(tmp_path / "home"),
        }  # fmt: skip
        told = []
        commands = [
            ["full", "--config", str(config), "--log-level", "debug"],
            ["status", "--store", "s3://kept/store", "--json"],
            ["status", "--store", "s3://kept/store"],
            ["verify", "--store", "s3://kept/store"],
        ]
        for words in commands:
            done = subprocess.run(
                [sys.executable, "-m", "pipelines", *words],
                cwd=CHECKOUT,
                env=environment,
                capture_output=True,
            )
            assert done.returncode == 0, (words, done.stderr.decode()[-3000:])
            told.append((" ".join(words), done.stdout + done.stderr))
        with at(bucket):
            client = boto3.client("s3", endpoint_url=bucket["AWS_ENDPOINT_URL"])
            pages = client.get_paginator("list_objects_v2").paginate(Bucket="kept")
            names = [item["Key"] for page in pages for item in page["Contents"]]
            stored = [(name, client.get_object(Bucket="kept", Key=name)["Body"].read()) for name in names]
        logs = [*spread(ray), *spread(tmp_path)]
        assert len(stored) > 20
        assert any("session_" in name for name, _ in logs)
        assert leaks(iter([*told, *stored, *logs])) == []
    assert len(MODELS) > 2


# Where credentials could leave a process


def test_an_error_shows_no_password(monkeypatch: pytest.MonkeyPatch) -> None:
    """Errors reach rows of failures, receipts and Ray: also one that a worker pickles."""
    monkeypatch.setenv("HF_TOKEN", SECRETS["HF_TOKEN"])
    text = f"https://operator:geheim12@mirror/x?sig=abc with {SECRETS['HF_TOKEN']} failed"
    failure = pickle.loads(pickle.dumps(ItemFailure(FailureReason.INTERNAL, text)))
    row = Failure.of("a/b", "0" * 40, "probe", FailureReason.INTERNAL, text)
    refusal = HubRefusalError("https://operator:geheim12@mirror/x", 500, "", "see https://a:b@c/?token=t")
    for shown in (str(failure), failure.detail, row.detail, str(StoreError(text))):
        assert "https://***@mirror/x?sig=*** with *** failed" in shown
    assert str(refusal) == "https://***@mirror/x answered 500 (see https://***@c/?token=***)."
    (problem,) = ConfigError("job.toml", ["store: s3://KEY:SEC/RET@bucket"]).problems
    assert problem == "store: s3://***@bucket"


def test_a_record_in_the_store_names_no_login() -> None:
    """Whatever a stage puts into a receipt: addresses in it have no user and no password, and the seal fits."""
    data = sealed_json({"endpoint": "https://operator:p%22ass@mirror", "parts": ["s3://bucket/a@b"]})
    assert unsealed_json(data, "here") == {"endpoint": "https://***@mirror", "parts": ["s3://bucket/a@b"]}


SPILL = """
import logging, sys, threading
from probelog import logs, terminal
import typer
logs.configure("debug")
other = logging.getLogger("other"); other.propagate = False; other.addHandler(logging.StreamHandler())
other.warning("retrying %s", "https://operator:geheim12@mirror/a")
try:
    raise ValueError("https://operator:geheim12@mirror/b")
except ValueError:
    logging.getLogger("probelog").exception("failed at https://operator:geheim12@mirror/c")
app = typer.Typer(pretty_exceptions_enable=False)
@app.command()
def spill() -> None:
    def fail(): raise KeyError("https://operator:geheim12@mirror/d")
    thread = threading.Thread(target=fail); thread.start(); thread.join()
    try:
        fail()
    except KeyError as error:
        raise RuntimeError("https://operator:geheim12@mirror/e") from error
sys.argv = ["spill"]
terminal.run(app, "spill")
"""


def test_no_log_and_no_traceback_shows_a_password() -> None:
    """Libraries with log handlers of their own, causes of errors, threads, and what ends a command."""
    done = subprocess.run([sys.executable, "-c", SPILL], cwd=CHECKOUT, capture_output=True, text=True)
    assert done.returncode == 1
    shown = [line for line in done.stderr.splitlines() if "geheim12@" not in line or "raise" not in line]
    for place in "abcde":
        assert f"https://***@mirror/{place}" in done.stderr, done.stderr
    assert not [line for line in shown if "geheim12" in line]


@pytest.mark.parametrize(
    "store", ["s3://AKIAKEY:geheim12@bucket/store", "s3://AKIAKEY:gehe/im12@bucket", "s3://geheim12@bucket"]
)
def test_keys_in_the_address_of_a_store_are_refused(store: str) -> None:
    """They would be recorded by Ray as the job's command line, and have never worked."""
    with pytest.raises(UsageError, match=r"s3://\*\*\*@bucket.*set AWS_ACCESS_KEY_ID") as refused:
        Store(store)
    assert "geheim12" not in str(refused.value)
    assert "im12" not in str(refused.value)


def test_keys_in_the_address_of_the_object_store_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://operator:geheim12@127.0.0.1:9")
    for use in (Store("s3://bucket/store").names, Store("s3://bucket/store").read, lance_options):
        with pytest.raises(UsageError, match="AWS_ENDPOINT_URL holds") as refused:
            use("s3://bucket/store")
        assert "geheim12" not in str(refused.value)


def test_the_login_of_a_mirror_is_sent_to_it_alone(
    tiny_world: TinyWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mirror with a password keeps working, by HF_ENDPOINT or by address, and its storage host learns nothing."""
    hub, storage = PasswordedHub(create_app(tiny_world.hub)), FaultyHub(create_app(tiny_world.hub))
    with serving(hub) as endpoint, serving(storage) as elsewhere:
        address = with_login(endpoint, "operator", SECRETS["userinfo of HF_ENDPOINT"])
        hub.spoil("/stored", answer(302, {"location": f"{elsewhere}/api/models"}))
        for given in (address, endpoint):
            if given == endpoint:
                monkeypatch.setenv("HF_ENDPOINT", address)
            with HubClient(given) as client:
                assert client.endpoint == endpoint
                assert len(client.json("/api/models").value) == len(MODELS)
                client.call("file", f"{endpoint}/stored", lambda reply: reply.response.read())
                assert client.json("/api/models", {"limit": 1}).next_url.startswith(f"{endpoint}/api/models")
    assert len(storage.requests) == 2
    assert not [request for request in storage.requests if "authorization" in request.headers]


def test_a_token_in_the_query_of_the_hubs_address_is_refused() -> None:
    with pytest.raises(UsageError, match="goes into HF_TOKEN") as refused:
        HubClient("https://mirror.example/hub?token=geheim12")
    assert "geheim12" not in str(refused.value)


def test_a_spec_of_a_worker_shows_no_password() -> None:
    """Ray may print an actor's arguments."""
    values = dict.fromkeys((field.name for field in dataclasses.fields(ProberSpec)), "x")
    assert "geheim12" not in repr(ProberSpec(**values | {"endpoint": "https://a:geheim12@b"}))  # type: ignore[arg-type]


# The scratch folder

OTHER = 12_345
needs_root = pytest.mark.skipif(os.getuid() != 0, reason="only root can act as another user")


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    """A folder of a machine's users, as /tmp is one."""
    folder = tmp_path / "shared"
    folder.mkdir()
    folder.chmod(0o1777)
    return folder


@pytest.fixture
def treasure(tmp_path: Path) -> Path:
    """What an operator would miss. Its folder is named as that of a worker that has ended."""
    file = tmp_path / "home/downloads/9999999/thesis.tex"
    file.parent.mkdir(parents=True)
    file.write_text("years")
    return file


@needs_root
@pytest.mark.parametrize(
    "dangling", [False, True], ids=["link-at-the-scratch-folder", "link-to-nothing-there"]
)
def test_scratch_is_no_link_of_another_user(shared: Path, treasure: Path, dangling: bool) -> None:
    """Another user leads the scratch folder to the operator's home, where ended workers' downloads are then deleted."""
    link = shared / "probelog"
    link.symlink_to(shared / "later" if dangling else treasure.parents[2])
    os.lchown(link, OTHER, OTHER)
    with pytest.raises(UsageError, match="belongs to another user: set `scratch`"):
        own_downloads(scratch_folder(shared))
    assert treasure.read_text() == "years"
    assert not (shared / "later").exists()


@needs_root
def test_scratch_is_not_below_a_link_of_another_user(shared: Path, treasure: Path) -> None:
    """The link stands one step above."""
    (shared / "node").symlink_to(treasure.parents[2])
    os.lchown(shared / "node", OTHER, OTHER)
    with pytest.raises(UsageError, match="node belongs to another user"):
        scratch_folder(shared / "node")
    assert not (treasure.parents[2] / "probelog").exists()


def test_the_scratch_folder_itself_is_no_link(shared: Path, treasure: Path) -> None:
    """Whoever made it: what lies below is deleted."""
    (shared / "probelog").symlink_to(treasure.parents[2])
    with pytest.raises(UsageError, match=r"is a link.*set `scratch` to where it leads"):
        own_downloads(scratch_folder(shared))
    assert treasure.read_text() == "years"


def test_no_link_below_the_scratch_folder_is_followed(shared: Path, treasure: Path) -> None:
    """The folder was prepared; of what it holds, one is a link."""
    (shared / "probelog").mkdir(mode=0o700)
    (shared / "probelog/downloads").symlink_to(treasure.parents[1])
    with pytest.raises(UsageError, match="downloads is a link"):
        own_downloads(scratch_folder(shared))
    assert treasure.read_text() == "years"


def test_a_scratch_folder_that_all_may_write_becomes_the_users_own(shared: Path) -> None:
    """It was made 0777 before the job ran."""
    (shared / "probelog").mkdir()
    (shared / "probelog").chmod(0o777)
    assert scratch_folder(shared).stat().st_mode & 0o777 == 0o700


@needs_root
def test_what_others_put_into_an_open_scratch_folder_is_refused(shared: Path) -> None:
    """Preprocessed probes of another user's making would decide what models answer. The second attempt is refused, too."""
    pixels = shared / "probelog/pixels"
    pixels.mkdir(parents=True)
    (shared / "probelog").chmod(0o777)
    (pixels / "a.pixels").write_bytes(b"0")
    os.chown(pixels / "a.pixels", OTHER, OTHER)
    for _ in range(2):
        with pytest.raises(UsageError, match=r"a\.pixels belongs to another user"):
            scratch_folder(shared)


@needs_root
def test_a_scratch_folder_of_another_user_is_refused(shared: Path) -> None:
    (shared / "probelog").mkdir(mode=0o777)
    os.chown(shared / "probelog", OTHER, OTHER)
    with pytest.raises(UsageError, match="belongs to another user"):
        scratch_folder(shared)


def test_scratch_is_not_where_all_may_rename_folders(shared: Path) -> None:
    """Without the sticky bit any user can put another folder in the place of a checked one."""
    shared.chmod(0o777)
    with pytest.raises(UsageError, match=r"can be changed by every user: `chmod \+t"):
        scratch_folder(shared)


def test_the_users_own_links_lead_to_their_scratch_folder(tmp_path: Path) -> None:
    """What an operator set up keeps working: links of their own, to folders that are not there yet."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "scratch").symlink_to("disk")
    (tmp_path / "round").symlink_to("round")
    made = scratch_folder(tmp_path / "scratch/a/../b")
    assert made == (tmp_path / "disk/b/probelog").resolve()
    assert made.stat().st_mode & 0o777 == 0o700
    with pytest.raises(UsageError, match="is no folder"):
        scratch_folder(tmp_path / "round")


# Ray on a shared machine

CONNECT = """
import ray, sys
try:
    ray.init(address=sys.argv[1], logging_level="ERROR", log_to_driver=False)
except BaseException as error:
    print("refused", type(error).__name__)
else:
    print("let in", ray.get(ray.remote(lambda: 1).remote()))
"""
LOCAL = """
import faulthandler, os, sys, subprocess
faulthandler.dump_traceback_later(120, exit=True)
from functools import partial
from pathlib import Path
from cluster.runtime.session import session  # first: it sets the environment that Ray reads when it is imported
import ray
with session("local", cpus=1):
    folder = ray._private.worker._global_node.get_session_dir_path()
    ray.get(ray.remote(lambda: 1).remote())  # a worker opens the folder again
    print(min(os.stat(part).st_mode & 0o077 for part in Path(folder).parents), folder)
    address = ray.get_runtime_context().gcs_address
    for token in ("0" * 64, os.environ.get("RAY_AUTH_TOKEN") or open(os.path.expanduser("~/.ray/auth_token")).read()):
        environment = {**os.environ, "HOME": "/nowhere", "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}
        print(subprocess.run([sys.executable, "-c", sys.argv[1], address], env=environment, capture_output=True, text=True).stdout)
"""


@needs_root
def test_ray_keeps_no_files_in_a_folder_of_another_user(
    shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Made before the job ran; the refusal says what helps."""
    monkeypatch.setattr(tempfile, "tempdir", str(shared))
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    made = shared / f"probelog-{os.getuid()}"
    made.mkdir()
    os.chown(made, OTHER, OTHER)
    with (
        pytest.raises(UsageError, match=r"belongs to another user: set `scratch`.*, and RAY_TMPDIR"),
        _private_folder(),
    ):
        pass
    monkeypatch.setenv("RAY_TMPDIR", "/tmp")
    with _private_folder():
        assert os.environ["RAY_TMPDIR"] == "/tmp"


@pytest.mark.acceptance
@pytest.mark.parametrize("writable", [True, False], ids=["home", "read-only-home"])
def test_nobody_else_uses_the_ray_of_a_job(tmp_path: Path, writable: bool) -> None:
    """Whoever reaches a local Ray's ports, or reads its token or logs, runs code as the operator."""
    home = tmp_path / "home" if writable else Path("/proc/nowhere")
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    run = partial(
        subprocess.run,
        [sys.executable, "-c", LOCAL, CONNECT],
        cwd=CHECKOUT,
        env={**kept, "HOME": str(home), "RAY_USAGE_STATS_ENABLED": "0"},
        capture_output=True,
        text=True,
        timeout=150,
    )
    done = run()
    assert done.stdout.count("\n") >= 2, done.stderr
    folder, refused, let_in = done.stdout.split("\n", 2)
    assert folder.startswith("0 "), (folder, done.stderr)
    assert refused.startswith("refused"), done.stdout
    assert "let in 1" in let_in, done.stdout
    if writable:
        assert (home / ".ray/auth_token").stat().st_mode & 0o777 == 0o600


# The hub server


@pytest.fixture
def hub_folder(tmp_path: Path) -> Path:
    """Repositories of which one is gated, one private, one disabled, one gated without an owner, and an uploader's."""
    root = tmp_path / "hub"
    closed = [
        {"id": "b/gated", "gated": "manual"},
        {"id": "b/private", "private": True},
        {"id": "b/off", "disabled": True},
    ]
    for repo in ("b/gated", "b/private", "b/off", "b/open", "alone", "u/loader"):
        (root / repo / "sub").mkdir(parents=True)
        for name in ("config.json", "sub/part.txt"):
            (root / repo / name).write_text(json.dumps({"of": repo}))
    (root / "u/loader/.git").mkdir()
    (root / "u/loader/.git/config").write_text('{"of": "https://me:token@hub"}')
    (root / "hub.json").write_text(json.dumps([*closed, {"id": "alone", "gated": True}]))
    return root


@pytest.mark.parametrize(
    "target",
    ["../../b/gated/config.json", "../../b/private/config.json", "../../b/off/sub/part.txt", "../../alone/sub/part.txt",
     ".git/config", "../../hub.json", "../../b/open/.git/config", "../../../outside.json"],
)  # fmt: skip
def test_a_link_leads_past_no_gate(hub_folder: Path, target: str) -> None:
    """An uploaded link to another repository's file, or to one that is never served."""
    (hub_folder / "b/open/.git").mkdir()
    (hub_folder / "b/open/.git/config").write_text("{}")
    (hub_folder.parent / "outside.json").write_text("{}")
    (hub_folder / "u/loader/link.json").symlink_to(target)
    assert (hub_folder / "u/loader/link.json").is_file()
    with running(hub_folder) as endpoint:
        assert httpx.get(f"{endpoint}/u/loader/resolve/main/config.json").json() == {"of": "u/loader"}
        reply = httpx.get(f"{endpoint}/u/loader/resolve/main/link.json")
        assert (reply.status_code, reply.headers["x-error-code"]) == (404, "EntryNotFound")
        siblings = httpx.get(f"{endpoint}/api/models/u/loader").json()["siblings"]
        assert [file["rfilename"] for file in siblings] == ["config.json", "sub/part.txt"]


def test_links_to_what_is_served_anyway_keep_working(hub_folder: Path) -> None:
    """Inside a repository, to one that is open, and into the blobs of a cache that huggingface_hub made."""
    cache = hub_folder / ".cache/models--o--cached"
    (cache / "blobs").mkdir(parents=True)
    (cache / "blobs/0af").write_text('{"of": "blob"}')
    (cache / "snapshots/0a").mkdir(parents=True)
    (cache / "snapshots/0a/config.json").symlink_to("../../blobs/0af")
    (hub_folder / "o").mkdir()
    (hub_folder / "o/cached").symlink_to("../.cache/models--o--cached/snapshots/0a")
    (hub_folder / "u/loader/inside.json").symlink_to("sub/part.txt")
    (hub_folder / "u/loader/other.json").symlink_to("../../b/open/config.json")
    with running(hub_folder) as endpoint:
        for path, of in (("u/loader/resolve/main/inside.json", "u/loader"), ("u/loader/resolve/main/other.json", "b/open"),
                         ("o/cached/resolve/main/config.json", "blob")):  # fmt: skip
            assert httpx.get(f"{endpoint}/{path}").json() == {"of": of}


@pytest.mark.parametrize(
    ("link", "target", "address"),
    [
        ("u/alias", "../b/gated", "u/alias/resolve/main/config.json"),
        ("other", "b", "other/gated/resolve/main/config.json"),
        ("again", "alone", "again/resolve/main/config.json"),
        ("x", "alone", "x/sub/resolve/main/part.txt"),
        ("y", "b/gated", "y/sub/resolve/main/part.txt"),
        (None, None, "alone/sub/resolve/main/part.txt"),
    ],
    ids=["repository", "owner", "without-owner", "folder-of-one", "repository-as-owner", "folder-of-a-gated-repository"],
)  # fmt: skip
def test_a_gated_repository_is_gated_under_every_name(
    hub_folder: Path, link: str | None, target: str | None, address: str
) -> None:
    """By a link to its folder, or by a folder inside it that is asked for as if it were a repository."""
    if link is not None and target is not None:
        (hub_folder / link).symlink_to(target)
    with running(hub_folder) as endpoint:
        reply = httpx.get(f"{endpoint}/{address}")
        assert reply.status_code in (403, 404)
        assert "of" not in reply.json()
        listed = {row["id"] for row in httpx.get(f"{endpoint}/api/models").json()}
        assert {name for name in listed if name in (link, "u/alias", "other/gated", "y/sub")} == set()


@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:80", "6.6.6.6", "[2001:db8::1]:80", "127.0.0.1@evil.example", "127.0.0.1.evil.example",
     'localhost">; rel="next", <http://evil.example', "localhost:80/evil.example?", "", "[", "localhost:1234567"],
)  # fmt: skip
def test_the_host_header_leads_nobody_away(hub_folder: Path, host: str) -> None:
    """An answer that is cached or passed on: its Link is followed by clients with their token."""
    with running(hub_folder) as endpoint:
        for path in ("/api/models", "/api/models/b/open/tree/main?recursive=true"):
            reply = raw(endpoint, f"GET {path}{'&' if '?' in path else '?'}limit=1 HTTP/1.1", f"Host: {host}")
            link = re.search(rb"\r\nlink: <([^>]*)>; rel=\"next\"\r\n", reply)
            if link is None:
                assert reply.startswith(b"HTTP/1.1 400")
            else:
                assert link[1].decode().startswith(f"{endpoint}{path.partition('?')[0]}?")
                assert len(json.loads(httpx.get(link[1].decode()).content)) == 1


def test_names_that_are_the_servers_own_stay_in_its_links(hub_folder: Path) -> None:
    """A tunnel's end, and what the operator says that clients reach it by."""
    with running(hub_folder) as endpoint:
        for host in ("localhost:9000", "127.0.0.1:9000", socket.gethostname()):
            assert f"<http://{host}/api/models?".encode() in raw(
                endpoint, "GET /api/models?limit=1 HTTP/1.1", f"Host: {host}"
            )
    with serving(create_app(hub_folder, "https://mirror.example/hub/")) as endpoint:
        reply = raw(endpoint, "GET /api/models?limit=1&sort=likes HTTP/1.1", "Host: evil.example")
        assert b"<https://mirror.example/hub/api/models?limit=1&sort=likes&cursor=" in reply


def test_the_servers_address_is_told_without_a_login(hub_folder: Path) -> None:
    """The operator's own address of a proxy, password and all, goes to every client."""
    words = [
        "-m",
        "pipelines",
        "hub",
        str(hub_folder),
        "--port",
        "0",
        "--address",
        "https://me:geheim12@mirror.example",
    ]
    with subprocess.Popen(
        [sys.executable, *words], cwd=CHECKOUT, stdout=subprocess.PIPE, text=True
    ) as server:
        assert server.stdout is not None
        told = [server.stdout.readline(), server.stdout.readline()]
        server.terminate()
    assert told[1] == "export HF_ENDPOINT=https://mirror.example\n", told
    assert "geheim12" not in told[0]


@pytest.mark.parametrize(
    "request_line",
    [
        "GET /u/loader/resolve/main/%2e%2e%2f%2e%2e%2fb%2fgated%2fconfig.json HTTP/1.1",
        "GET /u/loader/resolve/main/..%5c..%5cb/gated/config.json HTTP/1.1",
        "GET /u/loader/resolve/main/%c0%ae%c0%ae/%c0%ae%c0%ae/hub.json HTTP/1.1",
        "GET /u/loader/resolve/main/config.json%00.txt HTTP/1.1",
        "GET /u%2floader/..%2f..%2fb%2fgated/resolve/main/config.json HTTP/1.1",
        "GET /./b/gated/resolve/main/config.json HTTP/1.1",
        "GET //b/gated/resolve/main/config.json HTTP/1.1",
        "GET /b/gated%0a/resolve/main/config.json HTTP/1.1",
        "GET /B/Gated/resolve/main/config.json HTTP/1.1",
        "GET /.git/config/resolve/main/x HTTP/1.1",
        "GET /hub.json HTTP/1.1",
        "GET http://evil.example/b/gated/resolve/main/config.json HTTP/1.1",
        "GET /api/models/u/loader/tree/main/..%2f..%2fb HTTP/1.1",
        "GET /api/models?cursor=" + base64.urlsafe_b64encode(b'[[[[1e999,"x"').decode() + " HTTP/1.1",
        "GET /api/models?limit=" + "9" * 5000 + " HTTP/1.1",
        "GET /u/loader%0d%0aX-Evil:%201/resolve/main/config.json HTTP/1.1",
    ],
)
def test_no_address_reads_what_it_may_not(hub_folder: Path, request_line: str) -> None:
    with running(hub_folder) as endpoint:
        reply = raw(endpoint, request_line, "Host: localhost")
        head, _, body = reply.partition(b"\r\n\r\n")
        assert re.match(rb"HTTP/1.1 (400|403|404) ", head), head
        assert b'"of"' not in body
        assert b"x-evil" not in head.lower()


@pytest.mark.parametrize(
    "value",
    ["bytes=0-" + "9" * 5000, "bytes=" + ",".join(f"{n}-{n}" for n in range(0, 6000, 2)), "bytes=-0", "bytes=9-1",
     "bytes=" + "0-," * 5000, "bytes=\u0661-\u0662", "lines=1-2", "bytes=" + "0-" * 9000],
    ids=["digits", "thousands", "none", "backwards", "all-of-it-often", "foreign-digits", "unit", "dashes"],
)  # fmt: skip
def test_absurd_ranges_cost_nothing(hub_folder: Path, value: str) -> None:
    """Refused, or answered with the file at most: never more bytes than it has, never an error of the server's."""
    file = hub_folder / "u/loader/config.json"
    file.write_bytes(b"x" * 10_000)
    with running(hub_folder) as endpoint:
        reply = raw(
            endpoint, "GET /u/loader/resolve/main/config.json HTTP/1.1", f"Host: localhost\r\nRange: {value}"
        )
        head, _, body = reply.partition(b"\r\n\r\n")
        assert re.match(rb"HTTP/1.1 (200|206|400|416|431) ", head), head
        assert len(body) <= 10_000


def test_a_client_that_never_ends_its_request_is_dropped(
    hub_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would hold a connection for ever, and some thousands of it the server. On a used connection as on a fresh one."""
    monkeypatch.setattr(hubserver, "_REQUEST_SECONDS", 0.5)
    with running(hub_folder) as endpoint:
        host, _, port = endpoint.removeprefix("http://").partition(":")
        for first in (b"", b"GET /api/models HTTP/1.1\r\nHost: localhost\r\n\r\n"):
            with socket.create_connection((host, int(port)), timeout=20) as connection:
                connection.sendall(first)
                if first:
                    assert connection.recv(65536).startswith(b"HTTP/1.1 200")
                with pytest.raises(OSError, match=r"reset|[Bb]roken pipe"):
                    trickle(connection)


def trickle(connection: socket.socket) -> None:
    """A byte now and then, so that no idle connection is closed."""
    for _ in range(200):
        connection.sendall(b"G")
        time.sleep(0.05)


def raw(endpoint: str, request_line: str, *headers: str) -> bytes:
    """A request by hand: clients would tidy it."""
    host, _, port = endpoint.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        connection.sendall("\r\n".join([request_line, *headers, "Connection: close", "", ""]).encode())
        reply = b""
        with contextlib.suppress(ConnectionResetError):
            while part := connection.recv(65536):
                reply += part
    return reply
