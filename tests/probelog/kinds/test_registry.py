"""What kinds declare is what there is."""

from __future__ import annotations

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
    listed = listings(Generators().filters)
    assert [one.pipeline_tag for one in listed] == list(GENERATOR.tasks)
    assert {tuple(one.library) for one in listed} == {GENERATOR.libraries}


def test_a_file_or_a_task_is_one_listing() -> None:
    (named,) = listings(GeneratorFilters(list="repositories.txt"))  # type: ignore[arg-type]
    assert named.pipeline_tag is None
    (task,) = listings(GeneratorFilters(pipeline_tag="text-to-image", limit=3))
    assert (task.pipeline_tag, task.limit) == ("text-to-image", 3)
