"""The architecture as a test: imports run one way, and the query client stays light."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import CHECKOUT


def lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    """The contracts of ``pyproject.toml``, held against the packages in a folder."""
    code = "import sys; sys.path.insert(0, ''); from importlinter.cli import lint_imports_command; lint_imports_command()"
    return subprocess.run(
        [sys.executable, "-P", "-c", code, "--no-cache"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )


def test_imports_keep_the_contracts() -> None:
    done = lint_imports(CHECKOUT)
    assert done.returncode == 0, done.stdout
    assert "0 broken" in done.stdout


@pytest.mark.parametrize(
    ("module", "statement", "contract"),
    [
        ("probelog/storage/ledger.py", "import cluster.runtime.session", "The three roots"),
        ("probelog/storage/ledger.py", "from probelog.index import pointer", "The layers inside the library"),
        ("probelog/search/query.py", "from probelog.publication import rows", "What analysts install"),
        ("probelog/index/tables.py", "import torch", "What analysts install"),
        ("probelog/weights/reader.py", "import ray", "The library knows no Ray"),
    ],
)  # fmt: skip
def test_a_wrong_import_breaks_a_contract(module: str, statement: str, contract: str, tmp_path: Path) -> None:
    for name in ("probelog", "cluster", "pipelines"):
        shutil.copytree(
            CHECKOUT / name, tmp_path / name, ignore=shutil.ignore_patterns("world", "__pycache__")
        )
    shutil.copy(CHECKOUT / "pyproject.toml", tmp_path)
    file = tmp_path / module
    file.write_text(f"{file.read_text()}\n\n{statement}\n")
    done = lint_imports(tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    assert re.search(rf"{contract}.* BROKEN", done.stdout), done.stdout


@pytest.mark.parametrize(
    ("private", "home"),
    [
        (r"ray\._|ray\.core\b|\b_actor_id\b|_ray_actor_id", "cluster/runtime/ray_private.py"),
        (r"huggingface_hub\.(utils|hf_api|_)\b", "probelog/hub/huggingface.py"),
    ],
)
def test_private_parts_are_used_in_one_module(private: str, home: str) -> None:
    sources = [
        path for root in ("probelog", "cluster", "pipelines") for path in (CHECKOUT / root).rglob("*.py")
    ]
    using = {str(path.relative_to(CHECKOUT)) for path in sources if re.search(private, path.read_text())}
    assert using == {home}


HEAVY = [
    "torch",
    "ray",
    "transformers",
    "timm",
    "huggingface_hub",
    "torchvision",
    "pydantic",
    "boto3",
    "obstore",
]


@pytest.mark.parametrize(
    "code",
    [
        "import probelog",
        "import probelog; probelog.open_index",
        "import probelog.cli",
        "import probelog.encoders.text, probelog.encoders.image, probelog.index.generation, probelog.storage.store",
        "from typer.testing import CliRunner; import probelog.cli as c; r = CliRunner().invoke(c.app, ['--help']); "
        "assert r.exit_code == 0 and 'search' in r.output, r.output",
    ],
)
def test_the_query_client_is_light(code: str) -> None:
    check = f"{code}\nimport sys\nprint([name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.strip().splitlines()[-1] == "[]"


def test_importing_probelog_costs_nothing() -> None:
    check = "import probelog, sys; print([n for n in ('numpy', 'pyarrow', 'lancedb', 'typer') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_help_of_the_operators_command_is_light() -> None:
    check = (
        "from typer.testing import CliRunner; import pipelines.cli as c; import sys\n"
        "r = CliRunner().invoke(c.app, ['--help']); assert r.exit_code == 0\n"
        "print([n for n in ('torch', 'ray', 'transformers', 'timm') if n in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", check], capture_output=True, text=True, check=True, cwd=CHECKOUT
    )
    assert done.stdout.strip() == "[]"


def test_the_public_names_are_there() -> None:
    import probelog

    assert sorted(probelog.__all__) == [
        "Hit",
        "Index",
        "ProbeLogError",
        "Results",
        "__version__",
        "open_index",
    ]
    for name in probelog.__all__:
        assert getattr(probelog, name) is not None
