"""A real S3 server on loopback."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import boto3
import pytest
from moto.server import ThreadedMotoServer


@contextmanager
def s3_environment(bucket: str) -> Iterator[dict[str, str]]:
    """Runs moto's server and makes a bucket; yields the environment by which processes find it."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    endpoint = f"http://{host}:{port}"
    environment = {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": endpoint,
    }
    try:
        with at(environment):
            boto3.client("s3", endpoint_url=endpoint).create_bucket(Bucket=bucket)
        yield environment
    finally:
        server.stop()


@contextmanager
def s3_server(bucket: str = "probelog-test") -> Iterator[str]:
    """Likewise, with this process's own environment pointing at the server; yields the bucket's address."""
    with s3_environment(bucket) as environment, at(environment):
        yield f"s3://{bucket}"


@contextmanager
def at(environment: dict[str, str]) -> Iterator[None]:
    """This process's environment with some variables set."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        yield
