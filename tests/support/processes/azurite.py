"""A real Azure Blob Storage server on loopback: Microsoft's Azurite, where this machine has it.

``PROBELOG_AZURITE`` names the folder that ``npm install --prefix FOLDER azurite@3.35.0`` filled (`.ci/run` does so), else an
``azurite-blob`` on the path is taken.
"""

from __future__ import annotations

import base64
import email.utils
import hashlib
import hmac
import os
import re
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from tests.support.processes.operator_command import kill_tree
from tests.support.processes.s3 import at

# Of Azurite, known to everybody.
ACCOUNT = "devstoreaccount1"
KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="


def _command() -> list[str]:
    folder, node = os.environ.get("PROBELOG_AZURITE"), shutil.which("node")
    if folder and node:
        return [node, str(Path(folder) / "node_modules/azurite/dist/src/blob/main.js")]
    if installed := shutil.which("azurite-blob"):
        return [installed]
    pytest.skip(
        "az:// was NOT tested: npm install --prefix FOLDER azurite@3.35.0, and PROBELOG_AZURITE=FOLDER"
    )


@contextmanager
def azure_environment(container: str) -> Iterator[dict[str, str]]:
    """Runs Azurite and makes a container; yields the environment by which processes find it."""
    command = _command()
    with TemporaryDirectory(prefix="azurite-") as folder:
        log = Path(folder) / "log"
        with log.open("wb") as stream:
            options = ("--blobPort=0", "--inMemoryPersistence", "--skipApiVersionCheck", "--silent")
            process = subprocess.Popen(
                [*command, *options], cwd=folder, stdout=stream, stderr=stream, start_new_session=True
            )
        try:
            deadline = time.monotonic() + 60
            while not (at_work := re.search(r"listens on (http://\S+)", log.read_text())):
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.05)
            endpoint = f"{at_work[1]}/{ACCOUNT}"
            _make_container(endpoint, container)
            yield {
                "AZURE_STORAGE_ACCOUNT_NAME": ACCOUNT,
                "AZURE_STORAGE_ACCOUNT_KEY": KEY,
                "AZURE_STORAGE_ENDPOINT": endpoint,
            }
        finally:
            kill_tree(process)


@contextmanager
def azure_server(container: str = "probelog-test") -> Iterator[str]:
    """Likewise, with this process's own environment pointing at the server; yields the container's address."""
    with azure_environment(container) as environment, at(environment):
        yield f"az://{container}"


def _make_container(endpoint: str, name: str) -> None:
    """A request signed by the account's key: obstore makes no containers."""
    headers = {"x-ms-date": email.utils.formatdate(usegmt=True), "x-ms-version": "2021-08-06"}
    signed = "\n".join(
        ["PUT", *[""] * 11, *(f"{key}:{value}" for key, value in headers.items()),
         f"/{ACCOUNT}/{ACCOUNT}/{name}", "restype:container"]
    )  # fmt: skip
    digest = hmac.new(base64.b64decode(KEY), signed.encode(), hashlib.sha256).digest()
    headers |= {
        "Authorization": f"SharedKey {ACCOUNT}:{base64.b64encode(digest).decode()}",
        "Content-Type": "",
    }
    request = urllib.request.Request(
        f"{endpoint}/{name}?restype=container", data=b"", headers=headers, method="PUT"
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        assert answer.status == 201
