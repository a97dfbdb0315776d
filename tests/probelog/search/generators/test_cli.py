"""The command line over an index with generators."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from probelog.cli import app
from probelog.errors import QueryError
from probelog.storage.store import Store
from tests.support.worlds import small_generators


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    store = Store(tmp_path_factory.mktemp("generators") / "index")
    small_generators.build(store)
    return store.uri


def run(uri: str, *arguments: str) -> Result:
    return CliRunner().invoke(app, [*arguments, "--index", uri], catch_exceptions=True)


def test_generators_are_listed_as_table_json_and_csv(uri: str, tmp_path: Path) -> None:
    table = run(uri, "search", "cat", "--kind", "generator", "-k", "2")
    assert table.exit_code == 0
    assert "gina/cats (+1 copy)" in table.output
    assert "DDPMPipeline" in table.output
    rows = [
        json.loads(line)
        for line in run(uri, "search", "cat", "--kind", "generator", "--json").stdout.splitlines()
    ]
    assert rows[0]["repo"] == "gina/cats"
    assert rows[0]["pictures"] == 4
    printed = run(uri, "search", "cat", "--kind", "generator", "--format", "csv").stdout
    read = list(csv.DictReader(io.StringIO(printed)))
    assert read[0]["repo"] == "gina/cats"
    assert "\x1b" not in printed + table.output
    assert run(uri, "search", "cat", "--kind", "generator", "-q", "-k", "1").stdout == "gina/cats\n"


def test_sketches_and_models_are_asked(uri: str, tmp_path: Path) -> None:
    Image.new("RGB", (20, 20), "white").save(tmp_path / "sketch.png")
    sketched = run(uri, "search", "--kind", "generator", "--sketch", str(tmp_path / "sketch.png"), "-q")
    assert len(sketched.stdout.splitlines()) == 6
    logits = run(uri, "search", "--sketch", str(tmp_path / "sketch.png"), "-q", "-k", "3")
    assert len(logits.stdout.splitlines()) == 3
    alike = run(
        uri, "search", "--kind", "generator", "--like", "gina/cats", "--where", "pipeline = 'lora'", "-q"
    )
    assert alike.stdout == "kim/lora-umbrella\n"
    assert run(uri, "search", "--like", "gina/cats", "-q", "-k", "2").exit_code == 0
    none = run(uri, "search", "cat", "--kind", "generator", "--where", "image_size > 64")
    assert none.stdout == "no generator in this index meets the filter\n"


def test_files_of_names_and_families(uri: str, tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("violin\ncat\n")
    printed = run(uri, "search", "--queries", str(tmp_path / "names.txt"), "--kind", "generator", "-k", "1")
    answers = [json.loads(line) for line in printed.stdout.splitlines()]
    assert [item["hits"][0]["repo"] for item in answers] == ["hugo/violins", "gina/cats"]
    folded = run(uri, "search", "umbrella", "--kind", "generator", "--by", "family", "-k", "1")
    assert "kim/lora-umbrella (+1 of its family)" in folded.output
    other = ["--kind", "generator", "--like", "anna/pets#cat", "--like-index", uri, "-q", "-k", "2"]
    assert len(run(uri, "search", *other).stdout.splitlines()) == 2


def test_a_whole_classifier_is_asked_with(uri: str) -> None:
    made = ["--kind", "generator", "-k", "2", "--like"]
    table = run(uri, "search", *made, "eve/hostile")
    assert "found by" in table.output
    assert "\x1b" not in table.output
    assert "found by" not in run(uri, "search", *made, "gina/cats").output
    rows = [json.loads(line) for line in run(uri, "search", *made, "anna/pets", "--json").stdout.splitlines()]
    assert rows[0]["found_by"][0]["label"] in ("cat", "dog", "Golden_Retriever", "3")
    other = run(uri, "search", *made, "anna/pets", "--like-index", uri, "-q")
    assert other.stdout.splitlines() == [row["repo"] for row in rows]
    printed = run(uri, "search", *made, "anna/pets", "--format", "csv").stdout
    assert [row["repo"] for row in csv.DictReader(io.StringIO(printed))] == [row["repo"] for row in rows]
    assert isinstance(run(uri, "search", *made, "nobody/nothing").exception, QueryError)


def test_a_generator_is_shown(uri: str) -> None:
    shown = run(uri, "show", "kim/lora-umbrella")
    assert "model tree: root gina/cats, parent gina/cats, depth 1" in shown.output
    assert "adapter of gina/cats (moves its samples by" in shown.output
    assert "trigger words: umbr," in shown.output
    assert "4 of them as pictures" in shown.output
    assert "\x1b" not in shown.output
    assert json.loads(run(uri, "show", "ines/zoo", "--json").stdout)["samples"] == 64
    assert "ines/zoo" in run(uri, "show", "ines/zoo", "--format", "csv").stdout
    assert run(uri, "show", "ines/zoo", "-q").stdout == "ines/zoo\n"
    assert "anna/pets" in run(uri, "show", "anna/pets").output


@pytest.mark.parametrize(
    "arguments",
    [
        ["search", "--kind", "generator", "--model", "anna/pets"],
        ["search", "cat", "--method", "gaussian"],
        ["search", "--queries", "-", "--sketch", "x.png"],
        ["show", "ines/zoo", "--html", "page.html"],
        ["show", "nobody/nothing"],
    ],
)
def test_what_does_not_go_together_is_refused(uri: str, arguments: list[str]) -> None:
    result = run(uri, *arguments)
    assert isinstance(result.exception, QueryError)
