"""The wheel holds the query client and nothing that is too generic, or too heavy, for other people's environments."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from configparser import ConfigParser
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest

import probelog
from tests.support.paths import CHECKOUT


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    uv = os.environ.get("UV") or shutil.which("uv")
    if uv is None:
        pytest.skip("uv is not here: the wheel was not built and not tested")
    out = tmp_path_factory.mktemp("dist")
    done = subprocess.run(
        [uv, "build", "--wheel", "--quiet", "--out-dir", str(out), str(CHECKOUT)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode and ("hatchling" in done.stderr or "connect" in done.stderr):
        pytest.skip(f"the build backend cannot be had here: the wheel was not tested\n{done.stderr}")
    assert done.returncode == 0, done.stderr
    (file,) = out.glob("*.whl")
    return zipfile.ZipFile(file)


def metadata(wheel: zipfile.ZipFile) -> Message:
    name = next(name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    return Parser().parsestr(wheel.read(name).decode())


def test_it_holds_probelog_alone(wheel: zipfile.ZipFile) -> None:
    folder = f"probelog-{probelog.__version__}.dist-info"
    assert {name.split("/")[0] for name in wheel.namelist()} == {"probelog", folder}
    packed = {name for name in wheel.namelist() if name.startswith("probelog/")}
    assert packed == {
        str(file.relative_to(CHECKOUT))
        for file in (CHECKOUT / "probelog").rglob("*")
        if "__pycache__" not in file.parts and file.is_file()
    }
    assert "probelog/py.typed" in packed
    assert sum(info.file_size for info in wheel.infolist()) < 2_000_000


def test_its_commands(wheel: zipfile.ZipFile) -> None:
    name = next(name for name in wheel.namelist() if name.endswith("entry_points.txt"))
    points = ConfigParser()
    points.read_string(wheel.read(name).decode())
    assert dict(points["console_scripts"]) == {
        "probelog": "probelog.__main__:main",
        "probelog-index": "probelog.operators:main",
    }


def test_its_dependencies_are_the_query_clients(wheel: zipfile.ZipFile) -> None:
    needed = metadata(wheel).get_all("Requires-Dist") or []
    plain = {re.split("[<>]", line)[0].strip() for line in needed if "extra ==" not in line}
    assert plain == {"lancedb", "numpy", "onnxruntime", "pillow", "pyarrow", "tokenizers", "typer"}
    assert metadata(wheel)["License-Expression"] == "Apache-2.0"


def test_the_operators_command_says_where_it_lives(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    wheel.extractall(tmp_path)
    # Isolated, and without the checkout that an editable install puts on the path.
    code = (
        f"import sys; sys.path[:] = [{str(tmp_path)!r}] + [p for p in sys.path if p != {str(CHECKOUT)!r}]; "
        "from probelog.operators import main; main()"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-c", code, "--help"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 2
    assert "in the ProbeLog checkout" in done.stderr
    assert "uv run probelog-index" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
