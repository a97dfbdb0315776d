"""The image's steps, in a plain virtual environment: what the Dockerfile copies and runs is enough."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support.paths import CHECKOUT

DOCKERFILE = (CHECKOUT / "deploy/Dockerfile").read_text()


def copied(lines: str, app: Path) -> None:
    """Do what COPY lines do, with what .dockerignore lets through."""
    let_through = {
        line[1:] for line in (CHECKOUT / ".dockerignore").read_text().splitlines() if line.startswith("!")
    }
    for line in re.findall(r"^COPY (.*)$", lines, re.MULTILINE):
        *sources, target = [word for word in shlex.split(line) if not word.startswith("--")]
        for source in sources:
            assert {source, source.split("/")[0]} & let_through, f"{source} is not in the build's context"
            to = app / source if target == "./" else app / target
            to.parent.mkdir(parents=True, exist_ok=True)
            if (CHECKOUT / source).is_dir():
                shutil.copytree(
                    CHECKOUT / source, to, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__")
                )
            else:
                shutil.copy2(CHECKOUT / source, to)


def test_the_entry_point_of_the_image(tmp_path: Path) -> None:
    uv = os.environ.get("UV") or shutil.which("uv")
    if uv is None:
        pytest.skip("uv is not here: the image's steps were not tested")
    app, environment = tmp_path / "app", tmp_path / "venv"
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "RAY_", "UV_"))
    }
    kept |= {"VIRTUAL_ENV": str(environment), "PATH": f"{environment}/bin:{Path(uv).parent}:{kept['PATH']}"}
    for name in ("UV_INDEX_URL", "UV_DEFAULT_INDEX", "UV_CACHE_DIR", "UV_OFFLINE"):
        if name in os.environ:
            kept[name] = os.environ[name]

    def run(*words: str, folder: Path = app) -> subprocess.CompletedProcess[str]:
        return subprocess.run(words, cwd=folder, env=kept, capture_output=True, text=True, check=False)

    dependencies, code = re.split(r"^RUN uv venv .*\n(?:.*\\\n)*.*\n", DOCKERFILE, flags=re.MULTILINE)
    copied(dependencies, app)
    assert run(uv, "venv", "--quiet", str(environment)).returncode == 0
    # The accelerator's build needs no other index than the one in use; torch for CPUs alone would.
    installed = run("deploy/install.sh", "cuda")
    if installed.returncode and "connect" in installed.stderr.casefold():
        pytest.skip(f"packages cannot be had here: the image's steps were not tested\n{installed.stderr}")
    assert installed.returncode == 0, installed.stderr
    copied(code, app)

    (command,) = re.findall(r"^CMD \[(.*)\]$", DOCKERFILE, re.MULTILINE)
    helped = run(*(word.strip('" ') for word in command.split(",")), folder=tmp_path)
    assert helped.returncode == 0, helped.stderr
    for stage in ("crawl", "probe", "complete", "publish", "status"):
        assert stage in helped.stdout
    imported = run(
        "python",
        "-c",
        "import cluster, pipelines.demo.run, probelog; print(cluster.__file__)",
        folder=tmp_path,
    )
    assert imported.stdout.strip() == str(app / "cluster/__init__.py"), imported.stderr
    assert run("deploy/install.sh", "tpu").returncode == 2
