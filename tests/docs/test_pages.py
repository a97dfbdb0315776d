"""The README and the pages of docs/: their Python runs, what they name exists, and every failure reason is explained."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pipelines.inspect.remedies import REMEDIES, table
from probelog.errors import FailureReason
from probelog.storage.store import Store
from tests.support.paths import CHECKOUT
from tests.support.worlds import small_generators

if TYPE_CHECKING:
    from tests.support.worlds.tiny_world import Indexed

FILES = [
    CHECKOUT / "README.md",
    CHECKOUT / "CONTRIBUTING.md",
    CHECKOUT / "SECURITY.md",
    CHECKOUT / "CHANGELOG.md",
    CHECKOUT / "deploy/README.md",
    CHECKOUT / "deploy/grafana/README.md",
    *sorted((CHECKOUT / "docs").rglob("*.md")),
]
PAGES = {str(file.relative_to(CHECKOUT)): file.read_text(encoding="utf-8") for file in FILES}
BLOCK = re.compile(r"(?ms)^```(\w*)\n(.*?)^```")
PYTHON = [
    (name, i, code)
    for name, text in PAGES.items()
    for i, (kind, code) in enumerate(BLOCK.findall(text))
    if kind == "python"
]


def test_there_is_python_to_run() -> None:
    assert {"README.md", "docs/query.md"} <= {name for name, _, _ in PYTHON}


@pytest.mark.parametrize(("name", "number", "code"), PYTHON, ids=[f"{name}-{i}" for name, i, _ in PYTHON])
def test_a_python_block_runs(
    name: str, number: int, code: str, indexed: Indexed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With real things for what the pages' examples stand for (docs/development.md, "Documentation")."""
    from tests.support.worlds.tiny_encoders import photo

    monkeypatch.chdir(tmp_path)
    for seed, picture in enumerate(("a.jpg", "b.jpg")):
        photo(40, 40, seed).save(tmp_path / picture)
    store, model = str(indexed.store), "ada/resnet"
    if 'kind="generator"' in code:
        store, model = small_generators.build(Store(tmp_path / "index")).index.store.uri, "anna/pets"
    code = code.replace("s3://bucket/store", store).replace("owner/model", model)
    code = code.replace("owner/generator", "kim/lora-umbrella")
    exec(compile(code, f"{name}, block {number}", "exec"), {})


@pytest.mark.parametrize("name", PAGES)
def test_what_a_page_names_is_there(name: str) -> None:
    text = PAGES[name]
    paths = re.findall(
        r"(?<![\w/.*-])(?:probelog|cluster|pipelines|tests|deploy|docs|examples|\.ci)/[\w./-]*\w",
        re.sub(r"\w+://\S+", "", text),
    )
    assert not [path for path in paths if not (CHECKOUT / path).exists()]
    modules = re.findall(r"python -m ([\w.]+)", text)
    assert not [module for module in modules if find_spec(module) is None]


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_to_files_and_headings(name: str) -> None:
    folder = (CHECKOUT / name).parent
    for target in re.findall(r"\]\(([^)\s]+)\)", BLOCK.sub("", PAGES[name])):
        if target.startswith(("http", "#")):
            continue
        path, _, heading = target.partition("#")
        assert (folder / path).exists(), target
        if heading:
            titles = re.findall(r"(?m)^#+ (.*)$", (folder / path).read_text(encoding="utf-8"))
            assert heading in {
                re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", title.lower())) for title in titles
            }, target


def test_every_failure_reason_is_explained() -> None:
    text = PAGES["docs/operators/troubleshooting.md"]
    assert list(REMEDIES) == list(FailureReason)
    assert table() in text, "write what pipelines.inspect.remedies.table() gives"


def test_the_readme_is_short() -> None:
    assert len(PAGES["README.md"].splitlines()) <= 150


def test_every_page_is_in_the_site() -> None:
    navigation = set(re.findall(r"[\w/-]+\.md", (CHECKOUT / "mkdocs.yml").read_text(encoding="utf-8")))
    assert navigation == {name.removeprefix("docs/") for name in PAGES if name.startswith("docs/")}


def test_the_site_asks_no_other_host() -> None:
    settings = (CHECKOUT / "mkdocs.yml").read_text(encoding="utf-8")
    assert "font: false" in settings
    assert "://" not in settings
