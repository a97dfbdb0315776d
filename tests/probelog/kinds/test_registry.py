"""What kinds declare is what there is."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

from pipelines.config.model import Filters, GeneratorFilters, Generators
from pipelines.inspect.failures import Stage
from pipelines.sample.stage import listings
from probelog.hub.vocabulary import TASKS
from probelog.index import tables
from probelog.kinds.registry import CLASSIFIER, GENERATOR, KINDS


def test_kinds_have_nothing_in_common_by_accident() -> None:
    for name in ("name", "stage", "ledgers"):
        assert len({getattr(kind, name) for kind in KINDS}) == len(KINDS)
    owned = [table for kind in KINDS for table in kind.tables]
    assert len(set(owned)) == len(owned)
    for kind in KINDS:
        assert kind.stage in get_args(Stage)
        assert set(kind.tasks) <= TASKS
        assert {"download", "load", *kind.contents.computed} <= set(kind.contents.phases)
        fields = {"repo", "sha", "identity", "copy_of_repo", "copy_of_sha", "bytes", kind.contents.counted}
        assert fields <= set(kind.contents.models_schema.names)
    assert set(tables._REQUIRED) >= set(owned)


def test_the_filters_list_what_the_kinds_declare() -> None:
    classifiers = Filters()
    assert (tuple(classifiers.library), (classifiers.pipeline_tag,)) == (
        CLASSIFIER.libraries,
        CLASSIFIER.tasks,
    )
    listed = listings(Generators())
    assert [one.pipeline_tag for one in listed] == list(GENERATOR.tasks)
    assert {tuple(one.library) for one in listed} == {GENERATOR.libraries}


def test_a_file_or_a_task_is_one_listing() -> None:
    def listed(*, galleries: str | None = None, **filters: object) -> list[Filters]:
        return listings(Generators(galleries=galleries, filters=GeneratorFilters(**filters)))  # type: ignore[arg-type]

    (named,) = listed(list="repositories.txt")
    assert named.pipeline_tag is None
    task, galleries = listed(pipeline_tag="text-to-image", limit=3, galleries="galleries.txt")
    assert (task.pipeline_tag, task.limit, task.repos) == ("text-to-image", 3, None)
    assert (galleries.pipeline_tag, galleries.limit, galleries.repos) == (None, None, Path("galleries.txt"))
