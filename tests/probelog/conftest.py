"""Object stores other than S3, for tests that are run over every kind."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator

import pytest

from tests.support.processes.azurite import azure_server
from tests.support.processes.google import google_server


@pytest.fixture(scope="module")
def google() -> Iterator[str]:
    """A server of our own, or a real bucket (``PROBELOG_GOOGLE=gs://BUCKET``), in which a folder a run is left."""
    if real := os.environ.get("PROBELOG_GOOGLE"):
        yield f"{real.rstrip('/')}/probelog-tests/{uuid.uuid4().hex}"
        return
    with google_server() as (address, _):
        yield address


@pytest.fixture(scope="module")
def azure() -> Iterator[str]:
    with azure_server() as address:
        yield address
