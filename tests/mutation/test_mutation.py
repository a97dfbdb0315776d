"""The tool that tries mutants, and a sample of what it finds."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from cosmic_ray.mutating import mutate_code

from tests.mutation.__main__ import COLUMNS
from tests.mutation.operators import DropStatement, ReplaceName, ReverseMembership
from tests.mutation.run import BOUND, accepted, modules, sites
from tests.support.paths import CHECKOUT


@pytest.mark.parametrize("operator", [DropStatement, ReplaceName, ReverseMembership])
def test_an_operator_makes_what_its_examples_say(operator: type) -> None:
    for example in operator.examples():
        assert mutate_code(example.pre_mutation_code, operator(), 0) == example.post_mutation_code


def test_annotations_and_docstrings_are_no_places_for_mutants(tmp_path: Path) -> None:
    lines = [
        '"""At most 3."""',
        "def f(x: int | None = 3) -> int | None:",
        "    y: int | float = x + 1",
        "    return y",
    ]
    (tmp_path / "module.py").write_text("\n".join(lines) + "\n")
    found = [site.mutant(tmp_path) for site in sites("module.py", tmp_path)]
    assert sorted(mutant.after for mutant in found if mutant is not None) == [
        "def f(x: int | None = 2) -> int | None:",
        "def f(x: int | None = 4) -> int | None:",
        "y: int | float = x + 0",
        "y: int | float = x + 2",
        "y: int | float = x - 1",
    ]


def test_what_only_forbids_mistakes_is_no_place_for_mutants(tmp_path: Path) -> None:
    lines = [
        "if TYPE_CHECKING:",
        "    from x import y",
        "@dataclass(frozen=True, kw_only=True)",
        "class A:",
        "    @overload",
        "    def f(self): ...",
        "pairs = zip(a, b, strict=True)",
        "other = zip(a, b, strict=False)",
    ]
    (tmp_path / "module.py").write_text("\n".join(lines) + "\n")
    assert sorted({site.line for site in sites("module.py", tmp_path)}) == [3, 8], (
        "a decorator may be left out"
    )


def test_modules_and_tests_of_the_configuration_exist() -> None:
    for module, tests in modules().items():
        assert (CHECKOUT / module).is_file(), module
        assert tests, module
        for test in tests:
            assert (CHECKOUT / test.partition("::")[0]).exists(), test


def test_accepted_survivors_have_a_reason_and_still_stand_in_the_code() -> None:
    for entry in accepted():
        lines = {line.strip() for line in (CHECKOUT / entry.module).read_text().splitlines()}
        assert entry.line in lines, f"{entry.module} has no line {entry.line!r} any more"
        assert entry.reason


@pytest.mark.acceptance
def test_of_a_sample_of_mutants_enough_are_noticed() -> None:
    # Named, so that a further module in the configuration draws no others; their tests take seconds.
    few = [
        "probelog/hub/rate_limit.py",
        "probelog/ranking/confidence.py",
        "probelog/storage/checksummed_json.py",
        "probelog/storage/versions.py",
    ]
    command = [sys.executable, "-m", "tests.mutation", "--no-table", "--sample=5", "--seed=14"]
    # In a process of its own: it forks for every mutant, and threads of other tests' libraries do not survive that.
    done = subprocess.run(
        [*command, *(f"--module={module}" for module in few)],
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
        check=False,
    )
    rows = [line.split(",") for line in done.stdout.splitlines() if line.startswith(tuple(few))]
    assert len(rows) == len(few), done.stdout + done.stderr
    killed, survived = (sum(int(row[COLUMNS.index(name)]) for row in rows) for name in ("killed", "survived"))
    assert survived <= (1 - BOUND) * (killed + survived), done.stdout
