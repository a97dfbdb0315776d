"""Object stores other than S3, for tests that are run over every kind."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.processes.azurite import azure_server
from tests.support.processes.google import google_server


@pytest.fixture(scope="module")
def google() -> Iterator[str]:
    with google_server() as (address, _):
        yield address


@pytest.fixture(scope="module")
def azure() -> Iterator[str]:
    with azure_server() as address:
        yield address
