"""A Ray of a command's own."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.support.paths import CHECKOUT
from tests.support.processes.s3 import s3_environment

# What a nightly run does first: the live index is open when Ray starts.
_CODE = """
import lancedb
from cluster.runtime.session import session  # before Ray, which takes its environment when it is imported
import ray
from probelog import logs
from probelog.storage.store import Store

def work(name):
    return Store(name).read("a")

logs.configure()
Store("s3://bucket").write("a", b"1")
with session("local", 1):
    print(ray.get(ray.remote(num_cpus=1)(work).remote("s3://bucket")))
"""


@pytest.mark.acceptance
def test_libraries_do_not_warn_at_every_run() -> None:
    """LanceDB of forks, Ray of its future, Arrow of S3 connections that nobody closed."""
    with s3_environment("bucket") as environment:
        done = subprocess.run(
            [sys.executable, "-c", _CODE],
            cwd=CHECKOUT,
            env={"PATH": "/usr/bin:/bin", "HOME": "/nowhere", "RAY_AUTH_MODE": "disabled", **environment},
            capture_output=True,
            text=True,
            check=False,
            timeout=240,
        )
    assert (done.returncode, done.stdout, done.stderr) == (0, "b'1'\n", "")
