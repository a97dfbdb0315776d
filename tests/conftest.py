"""Fixtures that several folders of tests share."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import settings

from tests.support.paths import BENCH, KEPT_EXPORTS

if TYPE_CHECKING:
    from probelog.encoders.torch_encoder import Encoder
    from tests.support.worlds.tiny_world import Indexed, TinyWorld

pytest_plugins = ["tests.support.hub.repositories"]

# A local Ray would otherwise write a token file into the home directory.
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Hundreds of processes import the same libraries: they are to find what the first of them compiled.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

# No test is timed: machines are shared. Beside that the profile is Hypothesis's own, which in CI draws the same every time.
settings.register_profile("untimed", settings.default, deadline=None)
settings.load_profile("untimed")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep tests together that share what takes long to make; the others go wherever there is time.

    Those that need the indexed world are many: they go to one process, those that need a Ray alone to another. What a module
    makes once is made once: its tests that need it go to one process.
    """
    for item in items:
        fixtures = getattr(item, "fixturenames", ())
        if "local_ray" in fixtures:
            item.add_marker(pytest.mark.xdist_group("indexed" if "indexed" in fixtures else "ray"))
        elif isinstance(item, pytest.Function) and item.get_closest_marker("xdist_group") is None:
            made = item._fixtureinfo.name2fixturedefs.values()
            if any(definitions[-1].scope in ("module", "package") for definitions in made):
                item.add_marker(pytest.mark.xdist_group(item.nodeid.partition("::")[0]))


@pytest.fixture(scope="session")
def bench() -> Path:
    """The bench hub beside the checkout; tests that need it are skipped, loudly, where it is missing."""
    if not (BENCH / "truth.json").exists():
        pytest.skip(f"the bench hub is not at {BENCH}: this test did not run")
    return BENCH


@pytest.fixture(scope="session", autouse=True)
def _nothing_waits_for_the_disk() -> Iterator[None]:
    """No test loses its machine's power. Waiting until the disk has a file takes ten milliseconds, for many thousand files;
    what is asked of the system, and in which order, is tested in tests/probelog/storage/test_durability.py.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        yield


@pytest.fixture(scope="session", autouse=True)
def _servers_end_at_once() -> Iterator[None]:
    """Uvicorn looks every tenth of a second whether it should end: hundreds of tests have a server of their own."""
    import uvicorn.server

    async def sleep(seconds: float) -> None:
        await asyncio.sleep(seconds / 20)

    impatient = SimpleNamespace(**vars(asyncio) | {"sleep": sleep})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(uvicorn.server, "asyncio", impatient)
        yield


@pytest.fixture(scope="session", autouse=True)
def _exports_of_all_processes(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The exports of tiny encoders, made by whichever of the run's processes needs them first."""
    shared = "PYTEST_XDIST_WORKER" in os.environ
    if shared and KEPT_EXPORTS not in os.environ:
        folder = tmp_path_factory.getbasetemp().parent / "exports"
        folder.mkdir(exist_ok=True)
        os.environ[KEPT_EXPORTS] = str(folder)


@pytest.fixture(scope="session", autouse=True)
def _exported_once() -> Iterator[None]:
    """The same tower of the same encoder is traced once for the whole run: it takes seconds, for some thirty publishes, and
    to import what traces takes each process some more.
    """
    from probelog.encoders import onnx_export
    from tests.support.worlds.tiny_encoders import made_once

    traced: dict[tuple[str, str], tuple[bytes, int]] = {}
    trace = onnx_export._export

    def once(encoder: Encoder, tower: str, *details: Any) -> tuple[bytes, int]:
        key = (encoder.digest, tower)
        if key not in traced:
            traced[key] = made_once("-".join(key), lambda: trace(encoder, tower, *details))
        return traced[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnx_export, "_export", once)
        yield


@pytest.fixture(scope="session")
def s3_of_ray() -> Iterator[dict[str, str]]:
    """An object store that Ray's workers know from their environment: the variables for whoever talks to both."""
    from tests.support.processes.s3 import s3_environment

    with s3_environment("ray") as environment:
        yield environment


@pytest.fixture(scope="session")
def local_ray(s3_of_ray: dict[str, str]) -> Iterator[None]:
    """One real Ray for the whole run."""
    import ray

    from cluster.runtime.session import session
    from tests.support.processes.s3 import at

    with contextlib.ExitStack() as stack:
        with at(s3_of_ray):
            stack.enter_context(session("local", cpus=4))
        yield
    assert not ray.is_initialized()


@pytest.fixture
def bucket_of_ray(local_ray: None, s3_of_ray: dict[str, str]) -> Iterator[str]:
    """Address of a bucket that this process and Ray's workers reach."""
    from tests.support.processes.s3 import at

    with at(s3_of_ray):
        yield "s3://ray"


@pytest.fixture(scope="session")
def tiny_world(tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    """A hub of tiny classifiers with everything that indexing it needs; not to be changed."""
    from tests.support.worlds.tiny_world import make_tiny_world

    return make_tiny_world(tmp_path_factory.mktemp("tiny-world"))


@pytest.fixture(scope="session")
def indexed(
    tiny_world: TinyWorld, local_ray: None, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Indexed]:
    """The tiny world, served for as long as tests run, and indexed once with all probes; not to be changed."""
    from tests.support.worlds.tiny_world import index_tiny_world

    with index_tiny_world(tiny_world, tmp_path_factory.mktemp("indexed") / "store") as done:
        yield done
