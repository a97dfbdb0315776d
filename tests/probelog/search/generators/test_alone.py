"""An index that holds generators and no classifier: client, command line and page."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest
from PIL import Image
from typer.testing import CliRunner

from probelog.cli import app
from probelog.errors import QueryError
from probelog.search.client import Index, open_index
from probelog.storage.store import Store
from tests.support.processes.web_server import page
from tests.support.worlds import small_generators


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    store = Store(tmp_path_factory.mktemp("alone") / "index")
    small_generators.build(store, alone=True)
    return open_index(store.uri)


def test_generators_are_found(index: Index) -> None:
    assert (len(index), index.logits, int(index.generators)) == (0, 0, 7)
    assert index.search("violin", kind="generator", k=1)[0].repo == "hugo/violins"
    assert index.search(kind="generator", like="hugo/violins", negative="cat")
    assert index.models().num_rows == 0


def test_who_asks_for_classifiers_is_told(index: Index, tmp_path: Path) -> None:
    Image.new("RGB", (20, 20), "white").save(tmp_path / "sketch.png")
    answers = [
        index.search("cat"),
        index.search("cat", by="model", where="licence = 'mit'", sort="confidence", negative="dog"),
        index.search(like="hugo/violins"),
        index.search(sketch=tmp_path / "sketch.png"),
        *index.search_many(["cat", "dog"]),
    ]
    for found in answers:
        assert not found
        assert [note for note in found.notes if "holds generators alone" in note]
    assert not index.search_domain(["cat", "dog"])
    assert index.scores(["cat"]).shape == (1, 0)
    with pytest.raises(QueryError, match="does not hold"):
        index.show("anna/pets")


def test_the_command_line_says_so_too(index: Index) -> None:
    shown = CliRunner().invoke(app, ["search", "cat", "--index", index.uri])
    assert shown.exit_code == 0
    assert "--kind generator" in shown.output
    assert CliRunner().invoke(app, ["info", "--index", index.uri]).exit_code == 0


def test_the_page_asks_for_generators(index: Index) -> None:
    with page(index) as address, httpx.Client(base_url=address, timeout=30) as web:
        assert "Which models make it?" in web.get("/").text
        found = web.get("/search?q=violin").text
        assert "hugo/violins" in found
        assert 'type="radio" name="kind"' not in found
        asked = web.get("/search?kind=classifier&q=violin")
        assert (asked.status_code, "holds generators alone" in asked.text) == (200, True)
        assert web.get("/index").status_code == 200
