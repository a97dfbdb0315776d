"""The architecture as a test: imports run one way, and the query client stays light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import CHECKOUT

FLOORS = ["probelog", "cluster", "pipelines"]


def imported(file: Path) -> set[str]:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module or "")
    return {name.split(".")[0] for name in names}


@pytest.mark.parametrize("floor", FLOORS)
def test_nothing_imports_a_higher_floor(floor: str) -> None:
    files = sorted((CHECKOUT / floor).rglob("*.py"))
    assert files
    forbidden = (
        set(FLOORS[FLOORS.index(floor) + 1 :]) | {"tests"} | ({"ray"} if floor == "probelog" else set())
    )
    wrong = {str(file): bad for file in files if (bad := imported(file) & forbidden)}
    assert not wrong


HEAVY = ["torch", "ray", "transformers", "timm", "huggingface_hub", "torchvision", "pydantic", "boto3"]


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
