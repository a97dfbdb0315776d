"""Model trees of an index beside a truth file, with and without the store that it was made in."""

from __future__ import annotations

import datetime as dt
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from typer.testing import CliRunner

from pipelines.cli import app
from pipelines.trees.evaluate import evaluate_trees
from probelog.errors import QueryError, UsageError
from probelog.storage.ledger import ItemResult, Ledger
from probelog.storage.observations import to_rows
from probelog.storage.store import Store
from probelog.trees.edges import Edge, edge_table
from probelog.trees.families.tables import ModelFacts
from probelog.trees.recovery.recover import recover
from tests.benchmarks.trees_world import Forest, weights_table
from tests.probelog.storage.test_ledger import model as probed
from tests.support.worlds.small_index import Model, build

COPY = "zoe/copy"


@dataclass(frozen=True)
class Made:
    store: Path
    truth: Path
    content: Mapping[str, Any]
    edges: list[Edge]


def day(time: float) -> dt.datetime:
    return dt.datetime(2026, 1, 1, tzinfo=dt.UTC) + dt.timedelta(days=time)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A small forest: its statistics in a ledger, its edges in an index, and the truth about it."""
    folder = tmp_path_factory.mktemp("evaluate")
    world = Forest(7, trees=2, models=7, missing=0.1).world
    nodes = world.uploaded
    weights = weights_table(nodes)
    original = nodes[0]
    copies = weights.filter(pc.field("repo") == original.repo)
    named = copies.set_column(copies.schema.get_field_index("repo"), "repo", pa.array([COPY] * len(copies)))
    times = {node.repo: day(node.time) for node in nodes} | {COPY: day(1000)}
    models = [Model(repo, ("cat",), created_at=time) for repo, time in times.items()]

    ledger = Ledger(Store(folder / "store"), f"observations/{'b' * 16}")
    for model in models:
        rows = weights.filter(pc.field("repo") == model.repo)
        rows = rows.set_column(rows.schema.get_field_index("sha"), "sha", pa.array([model.sha] * len(rows)))
        copied = {"copy_of_repo": original.repo, "copy_of_sha": Model(original.repo, ()).sha} if model.repo == COPY else {}  # fmt: skip
        facts = probed(model.repo, sha=model.sha, logits=1, **copied)
        ledger.spool(model.repo.replace("/", "-"), ItemResult.success(facts, to_rows(model.repo, model.sha, np.ones((1, 7))), rows))  # fmt: skip
    names = [model.repo.replace("/", "-") for model in models]
    for part in (names[::2], names[1::2]):
        ledger.seal(part)

    facts = {repo: ModelFacts(time.timestamp()) for repo, time in times.items()}
    edges = recover(pa.concat_tables([weights, named]), facts)
    build(Store(folder / "store" / "index"), models=models, images=False, edges=edge_table(edges))

    def parents(node: Any) -> list[dict[str, Any]]:
        return [
            {"repo": None if p in world.withheld else p, "withheld": p, "weight": weight}
            for p, weight in node.parents.items()
        ]

    content = {
        "models": {
            **{n.repo: {"parents": parents(n), "relation": n.relation, "tree": n.tree} for n in nodes},
            COPY: {"parents": [{"repo": original.repo, "weight": 1}], "relation": "copy", "tree": original.tree},
            "not/indexed": {"parents": [], "relation": "root", "tree": "t"},
        },
        "withheld": {
            repo: {"parents": parents(world.nodes[repo]), "relation": "", "tree": ""} for repo in world.withheld
        },
    }  # fmt: skip
    (folder / "truth.json").write_text(json.dumps(content))
    return Made(folder / "store", folder / "truth.json", content, edges)


def test_the_index_beside_other_methods(made: Made) -> None:
    result = evaluate_trees(str(made.store), made.truth)

    count = len(made.content["models"])
    assert (result.models, result.notes) == ((count - 1, count), [])
    assert [method.name for method in result.methods] == [
        "this index", "nearest", "MoTHer, trees given", "MoTHer, not given", "nearest + time", "Atlas rules",
    ]  # fmt: skip
    index, *others = result.methods
    children = sum(any(p["repo"] for p in model["parents"]) for model in made.content["models"].values())
    assert index.figures.top1.of == children
    assert index.figures.top1.right > max(method.figures.top1.right for method in others)
    assert index.figures.relations["copy"].right >= 1
    assert index.figures.directed.given == len({(e.child, e.parent) for e in made.edges if not e.latent})
    assert index.figures.independent is not None
    assert index.figures.independent > 0
    assert sum(row.edges for row in index.reliability) == len(made.edges)
    assert {method.calibration_error for method in others} == {None}


def test_without_times_edges_are_recovered_again(made: Made) -> None:
    result = evaluate_trees(str(made.store), made.truth, times=False, declared=False)

    assert [method.name for method in result.methods] == [
        "this index", "again, without times and declared parents", "nearest", "MoTHer, trees given",
        "MoTHer, not given",
    ]  # fmt: skip
    again = result.methods[1]
    assert again.figures.top1.right > 0
    assert again.calibration_error is not None
    declared = evaluate_trees(str(made.store), made.truth, declared=False).methods[1]
    assert declared.name == "again, without declared parents"
    assert declared.figures.cells() == result.methods[0].figures.cells(), "none is declared: the same edges"


def test_an_index_without_its_store(made: Made, tmp_path: Path) -> None:
    shutil.copytree(made.store / "index", tmp_path / "alone")

    result = evaluate_trees(str(tmp_path / "alone"), made.truth)
    with_store = evaluate_trees(str(tmp_path / "alone"), made.truth, str(made.store))

    assert [method.name for method in result.methods] == ["this index"]
    assert result.methods[0].figures.independent is None
    assert result.notes[0].endswith("give the store that the index was made in (--store)")
    assert len(with_store.methods) == 6
    with pytest.raises(UsageError, match=r"edges cannot be recovered again: .*--store"):
        evaluate_trees(str(tmp_path / "alone"), made.truth, times=False)


def test_truth_files_that_cannot_be_used(made: Made, tmp_path: Path) -> None:
    other = {"models": {"x/y": {"parents": [], "relation": "root", "tree": "t"}}}
    for content, message in (
        ("{", "is no JSON"),
        ("{}", "is no truth file of model trees"),
        (json.dumps(other), "speaks of none of the models"),
    ):
        (tmp_path / "truth.json").write_text(content)
        with pytest.raises(UsageError, match=message):
            evaluate_trees(str(made.store), tmp_path / "truth.json")


def test_an_index_without_trees(made: Made, tmp_path: Path) -> None:
    (repo, *_) = made.content["models"]
    build(Store(tmp_path / "index"), models=[Model(repo, ("cat",))], images=False)

    with pytest.raises(QueryError, match="has no model trees"):
        evaluate_trees(str(tmp_path), made.truth)


def test_the_command(made: Made) -> None:
    arguments = ["evaluate-trees", "--index", str(made.store), "--truth", str(made.truth)]
    table = CliRunner().invoke(app, [*arguments, "--no-time"])
    done = CliRunner().invoke(app, [*arguments, "--json"])

    assert table.exit_code == 0, table.output
    assert "again, without times" in table.output
    assert "this index: right relations, given the parent: copy " in table.output
    assert "  probability 0.7 to 0.8: " in table.output
    plain = json.loads(done.output)
    assert plain["methods"][0]["name"] == "this index"
    assert plain["methods"][0]["top1"].keys() == {"right", "of"}
    assert {"precision", "recall", "f1"} <= plain["methods"][0]["directed"].keys()
