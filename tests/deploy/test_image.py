"""The image's steps, in a plain virtual environment: what the Dockerfile copies and runs is enough."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

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
            to = app / target / source.rsplit("/")[-1] if target.endswith("/") else app / target
            to.parent.mkdir(parents=True, exist_ok=True)
            if (CHECKOUT / source).is_dir():
                shutil.copytree(
                    CHECKOUT / source, to, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__")
                )
            else:
                shutil.copy2(CHECKOUT / source, to)


def is_listed_in_full(bill: dict[str, Any], frozen: str) -> None:
    """The bill of materials (CycloneDX) names what is installed, with hashes."""
    assert (bill["bomFormat"], bill["specVersion"]) == ("CycloneDX", "1.5")
    listed = {(part["name"], part["version"]): part for part in bill["components"]}
    installed = {tuple(line.split("==")) for line in frozen.splitlines()}
    assert len(installed) > 100
    assert installed - listed.keys() == set()
    for key in installed:
        references = listed[key]["externalReferences"]
        assert all(item["alg"] == "SHA-256" for part in references for item in part["hashes"])


@pytest.mark.acceptance
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

    dependencies, steps, code = re.split(
        r"^RUN (python -m venv .*\n(?:.*\\\n)*.*)\n", DOCKERFILE, flags=re.MULTILINE
    )
    copied(dependencies, app)
    made = run(sys.executable, "-m", "venv", str(environment))
    assert made.returncode == 0, made.stderr
    # The accelerator's build needs no other index than the one in use; torch for CPUs alone would.
    installed = run("deploy/install.sh", "cuda")
    if installed.returncode and "connect" in installed.stderr.casefold():
        pytest.skip(f"packages cannot be had here: the image's steps were not tested\n{installed.stderr}")
    assert installed.returncode == 0, installed.stderr
    _, _, export, *_ = (step.strip(" \\\n") for step in steps.split("&&"))
    exported = run(*shlex.split(export))
    assert exported.returncode == 0, exported.stderr
    frozen = run(
        "uv", "pip", "freeze", "--exclude-editable", "--exclude", "pip", "--exclude", "setuptools"
    ).stdout
    is_listed_in_full(json.loads((app / export.split()[-1]).read_text()), frozen)
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


# What the build refuses


PAGE = (CHECKOUT / "deploy/web/Dockerfile").read_text()


def test_the_base_image_is_one_and_no_other_than_its_digest_says() -> None:
    (base,) = {*re.findall(r"^FROM (.*)$", DOCKERFILE + PAGE, re.MULTILINE)}
    assert re.fullmatch(r"python:3\.\d+\.\d+-slim@sha256:[0-9a-f]{64}", base)
    for file in (DOCKERFILE, PAGE):
        assert "pip install" not in file  # without hashes
        assert re.search(r"(?m)^USER probelog$", file)
        assert not re.search(r"(?i)(ENV|ARG)\s+\S*(token|secret|key)", file)


@pytest.mark.acceptance
def test_the_pages_image(tmp_path: Path) -> None:
    """It answers without what builds an index, and holds nothing of it."""
    uv = os.environ.get("UV") or shutil.which("uv")
    if uv is None:
        pytest.skip("uv is not here: the steps of the page's image were not tested")
    app, environment = tmp_path / "app", tmp_path / "venv"
    copied(PAGE, app)
    assert not (app / "pipelines").exists()
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PYTHON", "RAY_", "UV_PYTHON"))
    }
    kept |= {"VIRTUAL_ENV": str(environment), "PATH": f"{environment}/bin:{Path(uv).parent}:{kept['PATH']}"}
    subprocess.run([uv, "venv", "--quiet", "--python", sys.executable, str(environment)], check=True)
    installed = subprocess.run(
        ["deploy/install.sh", "web"], cwd=app, env=kept, capture_output=True, text=True, check=False
    )
    if installed.returncode and "connect" in installed.stderr.casefold():
        pytest.skip(f"packages cannot be had here: the image's steps were not tested\n{installed.stderr}")
    assert installed.returncode == 0, installed.stderr
    names = {
        line.partition("==")[0]
        for line in subprocess.run(
            [uv, "pip", "freeze"], env=kept, capture_output=True, text=True, check=True
        ).stdout.splitlines()
    }
    assert {"starlette", "uvicorn", "jinja2", "prometheus-client", "lancedb"} <= names
    assert not names & {"torch", "ray", "transformers", "boto3", "playwright"}
    code = "import sys; from probelog.web.server import serve; print('torch' in sys.modules)"
    done = subprocess.run(
        [environment / "bin/python", "-I", "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == "False", done.stderr


PROJECT = """
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"
[project]
name = "probelog"
version = "1"
[project.optional-dependencies]
index = ["iniconfig"]
[tool.hatch.build.targets.wheel]
bypass-selection = true
"""


def pinned(*left_out: str, tampered: str = "") -> str:
    """The list of requirements without some packages, and with a wrong hash for one."""
    lines, name = [], ""
    for line in (CHECKOUT / "requirements.txt").read_text().splitlines():
        if line[:1].isalnum():
            name = line.partition("==")[0]
        if name == tampered:
            line = re.sub("sha256:[0-9a-f]{64}", "sha256:" + "0" * 64, line)
        if name not in left_out:
            lines.append(line)
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize(
    ("left_out", "tampered", "said"),
    [
        ("", "", ""),
        ("", "iniconfig", "ash mismatch"),
        ("", "hatchling", "ash mismatch"),
        ("iniconfig", "", "not in requirements.txt, so installed without a check: iniconfig"),
    ],
    ids=["as-listed", "another-package", "another-build-backend", "not-listed"],
)
def test_only_what_the_list_says_is_installed(
    tmp_path: Path, left_out: str, tampered: str, said: str
) -> None:
    """A package index that gives out something else, for a dependency or for what builds the package."""
    if shutil.which("uv") is None:
        pytest.skip("uv is not here: the installation was not tested")
    (tmp_path / "deploy").mkdir()
    shutil.copy2(CHECKOUT / "deploy/install.sh", tmp_path / "deploy")
    (tmp_path / "pyproject.toml").write_text(PROJECT)
    (tmp_path / "requirements.txt").write_text(pinned(left_out, tampered=tampered))
    environment = {
        **os.environ,
        "VIRTUAL_ENV": str(tmp_path / "venv"),
        "UV_CACHE_DIR": str(tmp_path / "cache"),
    }
    subprocess.run(["uv", "venv", "--quiet", str(tmp_path / "venv")], env=environment, check=True)
    done = subprocess.run(
        [tmp_path / "deploy/install.sh", "cuda"], env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode and "connect" in done.stderr.casefold():
        pytest.skip(f"packages cannot be had here: the installation was not tested\n{done.stderr}")
    assert done.returncode == (1 if said else 0), done.stderr
    assert said in done.stderr


@pytest.mark.parametrize("listed", [False, True])
def test_torch_for_cpus_is_never_installed_without_its_hash(tmp_path: Path, listed: bool) -> None:
    """PyTorch's index cannot be asked here: what is handed to uv decides."""
    (tmp_path / "deploy").mkdir()
    shutil.copy2(CHECKOUT / "deploy/install.sh", tmp_path / "deploy")
    shutil.copy2(CHECKOUT / "requirements.txt", tmp_path)
    own = "torch==9.9.9+cpu \\\n    --hash=sha256:12\n"
    (tmp_path / "deploy/torch-cpu.txt").write_text(own if listed else "# none\n")
    uv = tmp_path / "bin/uv"
    uv.parent.mkdir()
    uv.write_text(
        f"""#!/bin/sh
[ "$2" = install ] || exit 0
echo "$@" > {tmp_path}/asked
while [ "$1" != --constraint ]; do shift; done
cp "$2" {tmp_path}/given
"""
    )
    uv.chmod(0o755)
    done = subprocess.run(
        [tmp_path / "deploy/install.sh", "cpu"],
        env={"PATH": f"{uv.parent}:/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=True,
    )
    given = (tmp_path / "given").read_text()
    assert ("--torch-backend=cpu" in (tmp_path / "asked").read_text()) is listed
    assert ("deploy/torch-cpu.txt has no hashes" in done.stderr) is not listed
    if listed:
        assert re.findall(r"^torch.*", given, re.MULTILINE) == ["torch==9.9.9+cpu \\"]
        assert given.endswith(own)
    else:
        assert given == (CHECKOUT / "requirements.txt").read_text()
