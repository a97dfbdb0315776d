"""Attacks from around the job: credentials that leave it, folders that others prepared, callers of the hub server."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import boto3
import pytest

from cluster.probing.prober import ProberSpec
from cluster.runtime.scratch import own_downloads, scratch_folder
from pipelines.hubserver import create_app, serving
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
    hub = PasswordedHub(create_app(tiny_world.hub))
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
        config = tiny_world.config_file(tmp_path / "job.toml", "s3://kept/store", scratch=str(scratch))
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("HF_", "RAY_"))},
            **bucket,
            "HF_ENDPOINT": with_login(endpoint, "operator", SECRETS["userinfo of HF_ENDPOINT"]),
            "HTTPS_PROXY": f"http://operator:{SECRETS['userinfo of HTTPS_PROXY']}@127.0.0.1:9",
            "NO_PROXY": "127.0.0.1",
            **{name: SECRETS[name] for name in SECRETS if " " not in name},
            "RAY_AUTH_MODE": "disabled",
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
