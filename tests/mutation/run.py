"""Tries mutants of a module, one after the other, on the tests beside it, in a temporary copy of the tree.

Every mutant gets a process of its own, forked from one that has the libraries in memory: what it costs is what the tests
cost up to the first that fails.
"""

from __future__ import annotations

import ast
import difflib
import importlib
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeGuard

from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code

from tests.mutation.operators import operators
from tests.support.paths import CHECKOUT, KEPT_EXPORTS

HERE = Path(__file__).parent
BOUND = 0.85

Verdict = Literal["killed", "timed out", "survived", "accepted"]

# Imported before the first fork. Libraries that start threads when they are imported are not among them.
_LIBRARIES = (
    *("numpy", "scipy.linalg", "pyarrow.parquet", "pydantic", "PIL.Image", "jinja2"),
    *("httpx", "starlette.applications", "uvicorn", "boto3", "ray", "typer", "hypothesis", "pytest"),
)
# A mutant that runs in circles is noticed by its time; busy machines get some room.
_LIMIT_FACTOR, _LIMIT_FLOOR = 5.0, 8.0
_LEFT_OUT = (
    ".git",
    ".venv",
    ".hypothesis",
    ".mypy_cache",
    ".pytest_cache",
    ".ruff_cache",
    "dist",
    "site",
    "probelog-demo",
)


@dataclass(frozen=True)
class Mutant:
    """One change: the line before and after it, and the whole module with it."""

    module: str
    operator: str
    line: int
    before: str
    after: str
    code: str

    def __str__(self) -> str:
        return f"{self.module}:{self.line} {self.operator}: {self.before}  ->  {self.after}"


@dataclass(frozen=True)
class Accepted:
    """A survivor that no test needs to notice, and why."""

    module: str
    line: str
    reason: str
    becomes: str | None = None

    def covers(self, mutant: Mutant) -> bool:
        """Whether the mutant is this one."""
        same = (self.module, self.line) == (mutant.module, mutant.before)
        return same and self.becomes in (None, mutant.after)


def modules() -> dict[str, list[str]]:
    """The modules that are judged, and the tests of each."""
    return dict(tomllib.loads((HERE / "config.toml").read_text())["modules"])


def accepted() -> list[Accepted]:
    """The survivors that are accepted."""
    return [
        Accepted(**entry) for entry in tomllib.loads((HERE / "accepted.toml").read_text()).get("accepted", [])
    ]


@dataclass(frozen=True)
class Site:
    """Where a module may be changed: the operator's place number so and so."""

    module: str
    operator: str
    number: int
    line: int

    def mutant(self, root: Path = CHECKOUT) -> Mutant | None:
        """The module with the change; None where that is no program, or the same one."""
        source = (root / self.module).read_text()
        try:
            code = mutate_code(source, operators()[self.operator], self.number)
        except AttributeError:  # ExceptionReplacer knows plain names of exceptions only
            return None
        if code is None or code == source:
            return None
        try:
            compile(code, self.module, "exec")
        except SyntaxError:
            return None
        before, after = _changed_lines(source, code)
        if (before, after) == ("*,", "/,"):  # the mark between parameters is no product
            return None
        return Mutant(self.module, self.operator, self.line, before, after, code)


def sites(module: str, root: Path = CHECKOUT) -> list[Site]:
    """All places of a module, from top to bottom, but for those of annotations and messages."""
    source = (root / module).read_text()
    annotations, nodes = list(_annotations(source)), list(ast_nodes(get_ast(source)))
    result = []
    for name, operator in operators().items():
        positions = [place for node in nodes for place in operator.mutation_positions(node)]
        for number, (start, end) in enumerate(positions):
            if not any(first <= start and end <= last for first, last in annotations):
                result.append(Site(module, name, number, start[0]))
    return sorted(result, key=lambda site: (site.line, site.operator, site.number))


def sample(population: Sequence[Site], count: int | None, seed: int) -> list[Site]:
    """All, or so many by chance; those of a module stand together."""
    if count is None or count >= len(population):
        return list(population)
    numbers = sorted(random.Random(seed).sample(range(len(population)), count))
    return [population[number] for number in numbers]


@contextmanager
def temporary_copy() -> Iterator[Path]:
    """A copy of the tree, in which modules may be changed."""
    with tempfile.TemporaryDirectory(prefix="mutation-") as folder:
        root = Path(folder) / "tree"
        shutil.copytree(
            CHECKOUT, root, ignore=shutil.ignore_patterns("__pycache__", *_LEFT_OUT), symlinks=True
        )
        exports = Path(folder) / "exports"
        exports.mkdir()
        os.environ[KEPT_EXPORTS] = str(exports)
        yield root


def judge(chosen: Sequence[Site], root: Path) -> Iterator[tuple[Mutant, Verdict]]:
    """What becomes of each mutant, in a copy of the tree.

    Raises:
        RuntimeError: the tests fail without any change.
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # as in the tests: threads do not survive a fork
    for library in _LIBRARIES:
        importlib.import_module(library)
    known, tests, limits = accepted(), modules(), dict[str, float]()
    for number, site in enumerate(chosen):
        mutant = site.mutant(root)
        if mutant is None:
            continue
        path = root / mutant.module
        if mutant.module not in limits:
            limits[mutant.module] = _limit(root, tests[mutant.module])
        original = path.read_bytes()
        path.write_text(mutant.code)
        # A compiled file is taken for current when time (in whole seconds) and size agree.
        os.utime(path, (number, number))
        try:
            code = _tested(root, tests[mutant.module], limits[mutant.module])
        finally:
            path.write_bytes(original)
        if code == 0:
            yield mutant, "accepted" if any(some.covers(mutant) for some in known) else "survived"
        else:
            yield mutant, "timed out" if code is None else "killed"


def _limit(root: Path, tests: Sequence[str]) -> float:
    start = time.monotonic()
    if _tested(root, tests, 600.0, quiet=False) != 0:
        raise RuntimeError(f"without any change, these do not pass: {' '.join(tests)}")
    return max(_LIMIT_FLOOR, _LIMIT_FACTOR * (time.monotonic() - start))


def _tested(root: Path, tests: Sequence[str], limit: float, quiet: bool = True) -> int | None:
    """Exit code of the tests in a process of their own; None when they took too long."""
    child = os.fork()
    if not child:
        _run_tests(root, tests, quiet)
    deadline = time.monotonic() + limit
    while time.monotonic() < deadline:
        if (ended := os.waitpid(child, os.WNOHANG))[0]:
            _kill_group(child)
            return os.waitstatus_to_exitcode(ended[1])
        time.sleep(0.01)
    _kill_group(child)
    os.waitpid(child, 0)
    return None


def _run_tests(root: Path, tests: Sequence[str], quiet: bool) -> None:
    """In the child: run tests of the copy with its packages; does not return."""
    code = 3
    try:
        os.setsid()
        os.chdir(root)
        os.environ["PYTHONPATH"] = str(root)
        sys.path[:] = [str(root), *(place for place in sys.path if Path(place or ".").resolve() != CHECKOUT)]
        for name in [
            name
            for name in sys.modules
            if name.split(".")[0] in ("probelog", "cluster", "pipelines", "tests")
        ]:
            del sys.modules[name]
        if quiet:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, 1)
            os.dup2(nowhere, 2)
            sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - until the process ends
        import hypothesis
        import pytest

        # Whether some example fails is all that counts; the smallest one would be looked for in vain.
        phases = (hypothesis.Phase.explicit, hypothesis.Phase.generate)
        hypothesis.settings.register_profile(
            "mutation",
            phases=phases,
            database=None,
            deadline=None,
            derandomize=True,
            suppress_health_check=list(hypothesis.HealthCheck),
        )
        hypothesis.settings.load_profile("mutation")
        code = int(
            pytest.main(
                ["-x", "-n", "0", "-q", "-p", "no:cacheprovider", "--tb=short", "--disable-warnings", *tests]
            )
        )
    finally:
        sys.stdout.flush()
        os._exit(code)


def _kill_group(leader: int) -> None:
    try:
        os.killpg(leader, signal.SIGKILL)
    except ProcessLookupError:
        return


def _annotations(source: str) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    """Where annotations stand and what is imported for them, what only forbids mistakes, and texts for people: no program
    does anything else.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.arg | ast.AnnAssign) and node.annotation is not None:
            yield _span(node.annotation)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            if node.returns is not None:
                yield _span(node.returns)
            for item in node.decorator_list:
                if ast.unparse(item) == "overload":
                    yield (item.lineno, 0), (item.lineno + 1, 0)
        elif isinstance(node, ast.keyword) and _forbids(node):
            yield _span(node.value)
        elif isinstance(node, ast.JoinedStr) or _logs(node) or _for_types(node):
            yield _span(node)


def _forbids(node: ast.keyword) -> bool:
    # `zip(..., strict=True)` is an assertion: that its columns are equally long. Arrays make no use of `eq`.
    return node.arg in ("frozen", "slots", "kw_only") or ast.unparse(node) in ("strict=True", "eq=False")


def _logs(node: ast.AST) -> TypeGuard[ast.expr]:
    function = node.func if isinstance(node, ast.Call) else None
    owner = function.value if isinstance(function, ast.Attribute) else None
    return isinstance(owner, ast.Name) and owner.id in ("log", "_log")


def _for_types(node: ast.AST) -> TypeGuard[ast.stmt]:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def _span(node: ast.expr | ast.stmt) -> tuple[tuple[int, int], tuple[int, int]]:
    assert node.end_lineno is not None
    assert node.end_col_offset is not None
    return (node.lineno, node.col_offset), (node.end_lineno, node.end_col_offset)


def _changed_lines(source: str, code: str) -> tuple[str, str]:
    lines = [*difflib.ndiff(source.splitlines(), code.splitlines())]
    return tuple(
        " ".join(line[2:].strip() for line in lines if line.startswith(sign)) for sign in ("- ", "+ ")
    )
